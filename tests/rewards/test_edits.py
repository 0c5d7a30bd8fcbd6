"""Error rates agree with jiwer, and corpora add up."""

import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.errors import UserError
from audio_grpo.rewards import EditCounts, character_edits, compute_cer, compute_wer, word_edits

words = st.lists(st.sampled_from(["a", "b", "ab", "seven", "lamps", "مرحبا", "كيف", "你好", "ß"]), max_size=8)
spaces = st.sampled_from([" ", "  ", "\n ", "\t\t"])
sentences = st.builds(lambda parts, gap: gap.join(parts), words, spaces)
spoken = sentences.filter(str.strip)


@given(spoken, sentences)
def test_word_edits_are_jiwers(reference: str, hypothesis: str) -> None:
    expected, found = jiwer.process_words(reference, hypothesis), word_edits(reference, hypothesis)
    assert compute_wer(reference, hypothesis) == pytest.approx(expected.wer)
    assert (found.substitutions, found.deletions, found.insertions, found.hits) == (
        expected.substitutions,
        expected.deletions,
        expected.insertions,
        expected.hits,
    )


@given(st.text("aé كَ你\t", min_size=1).filter(str.strip), st.text("aé كَ你\t"))
def test_character_edits_are_jiwers(reference: str, hypothesis: str) -> None:
    expected, found = jiwer.process_characters(reference, hypothesis), character_edits(reference, hypothesis)
    assert compute_cer(reference, hypothesis) == pytest.approx(expected.cer)
    assert (found.substitutions, found.deletions, found.insertions, found.hits) == (
        expected.substitutions,
        expected.deletions,
        expected.insertions,
        expected.hits,
    )


@given(st.lists(st.tuples(spoken, sentences), min_size=1, max_size=6))
def test_a_corpus_rate_is_all_edits_over_all_words(pairs: list[tuple[str, str]]) -> None:
    total = sum((word_edits(reference, hypothesis) for reference, hypothesis in pairs), EditCounts())
    references, hypotheses = zip(*pairs, strict=True)
    assert total.rate == pytest.approx(jiwer.wer(list(references), list(hypotheses)))
    assert total.reference_length == sum(len(reference.split()) for reference in references)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wer", "cer"),
    [
        ("seven blue lamps", "seven blue lamps", 0.0, 0.0),
        ("seven blue lamps", "", 1.0, 1.0),
        ("seven", "a b c seven", 3.0, 6 / 5),
        ("", "", 0.0, 0.0),
        ("  ", "\n", 0.0, 0.0),
        ("", "two words", 2.0, 9.0),
    ],
)
def test_hand_worked_rates(reference: str, hypothesis: str, wer: float, cer: float) -> None:
    assert compute_wer(reference, hypothesis) == pytest.approx(wer)
    assert compute_cer(reference, hypothesis) == pytest.approx(cer)


def test_both_texts_are_normalised_by_the_same_rule() -> None:
    assert compute_wer("Hello, World!", "hello world") == 1.0
    assert compute_wer("Hello, World!", "hello world", "basic") == 0.0
    assert compute_wer("مَدرسة", "مدرسة", normalizer="arabic-leaderboard") == 0.0
    assert compute_cer("你好，世界", "你 好世界", "cjk") == 0.0


def test_an_unknown_normaliser_is_refused() -> None:
    with pytest.raises(UserError, match="text normaliser 'english'"):
        compute_wer("a", "a", "english")  # pyright: ignore[reportArgumentType]
