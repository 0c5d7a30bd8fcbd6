import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.data.skipping import SkippingAccount
from audio_grpo.data.source import Unusable
from audio_grpo.errors import UserError

BROKEN = Unusable("b", "broken")


def test_unusable_records_are_listed_by_reason():
    account = SkippingAccount(max_fraction=0.9, epoch=4)
    account.note([None, Unusable("a", "too long")])
    account.note([BROKEN, Unusable("c", "too long")])
    assert account.skipped.seen == 4
    assert account.skipped.reasons == {"too long": ["a", "c"], "broken": ["b"]}


def test_later_epochs_are_not_counted_again():
    account = SkippingAccount(max_fraction=0.5, epoch=2)
    for _ in range(10):
        account.note([None, BROKEN, BROKEN])
    assert (account.skipped.seen, account.skipped.reasons) == (2, {"broken": ["b"]})


@given(usable=st.lists(st.booleans(), min_size=1, max_size=60), fraction=st.floats(0, 1))
def test_a_small_set_stops_exactly_when_its_share_is_exceeded_whatever_the_order(usable, fraction):
    account = SkippingAccount(fraction, epoch=len(usable))
    bad = len(usable) - sum(usable)
    stops = bad > fraction * len(usable) or bad == len(usable)
    try:
        for is_usable in usable:
            account.note([None if is_usable else BROKEN])
        stopped = False
    except UserError:
        stopped = True
    assert stopped == stops


def test_a_large_set_of_rubbish_stops_early():
    account = SkippingAccount(max_fraction=0.05, epoch=1_000_000)
    with pytest.raises(UserError, match=r"51 of the first 51 records are unusable, of 1000000"):
        for _ in range(1_000_000):
            account.note([BROKEN])


def test_the_message_counts_reasons_and_names_a_few_records():
    account = SkippingAccount(max_fraction=0.5, epoch=20)
    with pytest.raises(UserError, match=r"11 × too long: n0, n1, n2, n3, n4, …"):
        for number in range(20):
            account.note([Unusable(f"n{number}", "too long")])


def test_a_set_without_any_usable_record_stops_even_when_all_may_be_skipped():
    account = SkippingAccount(max_fraction=1.0, epoch=3)
    with pytest.raises(UserError, match="No record is usable"):
        for _ in range(3):
            account.note([BROKEN])
