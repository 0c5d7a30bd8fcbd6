import jiwer
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.report.diff import align, diff
from audio_grpo.text.normalizers import get_normalizer

WORDS = st.lists(st.sampled_from(["a", "b", "c", "ولد", "<i>"]), min_size=1, max_size=8)


@given(WORDS, WORDS)
def test_an_alignment_spells_out_both_sides(reference, hypothesis):
    edits = align(reference, hypothesis)
    assert [edit.reference for edit in edits if edit.reference] == reference
    assert [edit.hypothesis for edit in edits if edit.hypothesis] == hypothesis
    assert all((edit.reference == edit.hypothesis) == (edit.kind == "equal") for edit in edits)


@given(WORDS, WORDS)
def test_as_many_words_are_marked_as_jiwer_counts_errors(reference, hypothesis):
    marked = sum(edit.kind != "equal" for edit in align(reference, hypothesis))
    counts = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    assert marked == counts.substitutions + counts.deletions + counts.insertions


def test_each_kind_of_error_has_its_own_mark():
    marked = diff("seven lamps in the hall", "Seven lamp in the a", get_normalizer("basic"))
    assert '<span class="substituted"><del>lamps</del><ins>lamp</ins></span>' in marked
    assert '<span class="substituted"><del>hall</del><ins>a</ins></span>' in marked
    assert '<span class="deleted"><del>b</del></span>' in diff("a b", "a", get_normalizer("basic"))
    assert '<span class="inserted"><ins>b</ins></span>' in diff("a", "a b", get_normalizer("basic"))


def test_what_the_normaliser_makes_equal_is_not_an_error():
    assert "<span" not in diff("Seven, lamps!", "seven lamps", get_normalizer("basic"))
    assert "<span" in diff("Seven, lamps!", "seven lamps", get_normalizer("none"))


def test_unspaced_scripts_are_compared_by_character():
    assert '<span class="substituted"><del>好</del><ins>号</ins></span>' in diff(
        "你好吗", "你号 吗", get_normalizer("cjk")
    )


def test_text_takes_its_own_direction():
    assert 'dir="auto"' in diff("ذهب الولد", "ذهب", get_normalizer("basic"))
