"""Each normaliser does what its name promises, Arabic included, and nothing more."""

from importlib.metadata import version
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from audio_grpo.config import NormalizerName
from audio_grpo.errors import UserError
from audio_grpo.text import get_normalizer

GREETING = "مَرْحَبًا، كَيْفَ حَالُكَ؟"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("none", " A  b. ", " A  b. "),
        ("basic", "Hello,  WORLD!\n", "hello world"),
        ("basic", "It's the dogs' state-of-the-art 'quote'", "it's the dogs state of the art quote"),
        ("basic", "don’t don‘t don`t", "don't don't don't"),
        ("basic", "Straße ﬁve ＡＢＣ ½", "strasse five abc 1 2"),
        ("basic", "snake_case €5 + 3%", "snake case 5 3"),
        ("basic", GREETING, "مَرْحَبًا كَيْفَ حَالُكَ"),
        ("basic", "नमस्ते, दुनिया।", "नमस्ते दुनिया"),
        ("basic", "...", ""),
        ("whisper-english", "Mr. Smith won't pay twenty dollars", "mister smith will not pay $20"),
        ("whisper-basic", "Hello, WORLD (noise)!", "hello world "),
        ("arabic-leaderboard", GREETING, "مرحبا كيف حالك"),
        ("arabic-leaderboard", "آمن أحمد إلى مؤمن شيئ سماء", "امن احمد الى مومن شيي سما"),
        ("arabic-leaderboard", "پاريس ڤيينا ١٢٣٤٥٦٧٨٩٠", "باريس فيينا 1234567890"),
        ("arabic-leaderboard", "مدرسة على الكـــبير", "مدرسة على الكـــبير"),
        ("arabic-leaderboard", "نعم؛ لا! (ربما)", "نعم لا ربما"),
        ("arabic-extended", "مدرسة على الكـــبير", "مدرسه علي الكبير"),
        ("arabic-extended", "الآنَ، أُختي؟", "الان اختي"),
        ("cjk", "你好，世界。 ＡＢ c", "你好世界abc"),
        ("cjk", "今日は、 いい天気", "今日はいい天気"),
    ],
)
def test_texts_come_out_comparable(name: NormalizerName, text: str, expected: str) -> None:
    assert get_normalizer(name)(text) == expected


def test_whispers_basic_rules_take_marked_arabic_words_apart() -> None:
    assert len(get_normalizer("whisper-basic")(GREETING).split()) > 3


@pytest.mark.parametrize("name", get_args(NormalizerName))
def test_every_name_has_a_normaliser_with_name_and_version(name: NormalizerName) -> None:
    normalizer = get_normalizer(name)
    assert normalizer.name == name
    assert normalizer.version == (version("whisper-normalizer") if name.startswith("whisper") else "1")
    assert get_normalizer(name) is normalizer


@given(st.text() | st.text(st.sampled_from("aB'’ ,.-ًآة١ـ好")))
@example("0 ـ")
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    for name in ("none", "basic", "cjk", "arabic-leaderboard", "arabic-extended"):
        rule = get_normalizer(name)
        assert rule(rule(text)) == rule(text)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'arabic'.*arabic-leaderboard"):
        get_normalizer("arabic")  # pyright: ignore[reportArgumentType]
