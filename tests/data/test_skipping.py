import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.data.skipping import SkipUnusable
from audio_grpo.data.source import Unusable
from audio_grpo.errors import UserError

BROKEN = Unusable("b", "broken")


def test_usable_records_pass_and_others_are_listed_by_reason():
    skip = SkipUnusable(max_fraction=0.9, epoch=4)
    elements = [{}, Unusable("a", "too long"), BROKEN, Unusable("c", "too long")]
    assert [skip(element) for element in elements] == [True, False, False, False]
    assert skip.skipped.seen == 4
    assert skip.skipped.reasons == {"too long": ["a", "c"], "broken": ["b"]}


def test_later_epochs_are_not_counted_again():
    skip = SkipUnusable(max_fraction=0.5, epoch=2)
    for _ in range(10):
        assert (skip({}), skip(BROKEN)) == (True, False)
    assert (skip.skipped.seen, skip.skipped.reasons) == (2, {"broken": ["b"]})


@given(usable=st.lists(st.booleans(), min_size=1, max_size=60), fraction=st.floats(0, 1))
def test_a_small_set_stops_exactly_when_its_share_is_exceeded_whatever_the_order(usable, fraction):
    skip = SkipUnusable(fraction, epoch=len(usable))
    bad = len(usable) - sum(usable)
    stops = bad > fraction * len(usable) or bad == len(usable)
    try:
        for is_usable in usable:
            skip({} if is_usable else BROKEN)
        stopped = False
    except UserError:
        stopped = True
    assert stopped == stops


def test_a_large_set_of_rubbish_stops_early():
    skip = SkipUnusable(max_fraction=0.05, epoch=1_000_000)
    with pytest.raises(UserError, match=r"51 of the first 51 records are unusable, of 1000000"):
        for _ in range(1_000_000):
            skip(BROKEN)


def test_the_message_counts_reasons_and_names_a_few_records():
    skip = SkipUnusable(max_fraction=0.5, epoch=20)
    with pytest.raises(UserError, match=r"11 × too long: n0, n1, n2, n3, n4, …"):
        for number in range(20):
            skip(Unusable(f"n{number}", "too long"))


def test_a_set_without_any_usable_record_stops_even_when_all_may_be_skipped():
    skip = SkipUnusable(max_fraction=1.0, epoch=3)
    with pytest.raises(UserError, match="No record is usable"):
        for _ in range(3):
            skip(BROKEN)
