from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.rollout.scheduler import Scheduler


@given(
    parts=st.integers(1, 3),
    rows=st.integers(1, 4),
    prompts=st.integers(0, 15),
    generations=st.integers(1, 3),
    data=st.data(),
)
def test_every_prompt_gets_a_row_once_and_the_queue_names_it_in_order(parts, rows, prompts, generations, data):
    scheduler = Scheduler(parts=parts, rows=parts * rows, prompts=prompts, generations=generations)
    lined_up = [[] for _ in range(parts)]
    seen = []
    while not scheduler.done:
        for prefill in scheduler.admit():
            lined_up[prefill.part].append(prefill.row)
            seen.append(prefill.prompt)
        ring, end, cancelled, closed = scheduler.queue()
        assert end.tolist() == [len(rows_of_part) * generations for rows_of_part in lined_up]
        assert not cancelled.any()
        assert closed == (len(seen) == prompts)
        residents = scheduler.residents
        for part in range(parts):
            # All that can still wait on the device: the newest prompts, as many as there are busy rows.
            busy = sum(1 for p, _ in residents if p == part)
            for place in range(len(lined_up[part]) - busy, len(lined_up[part])):
                assert ring[part, place % rows] == lined_up[part][place]
        assert len(residents) <= parts * rows
        # The device works in order, but completions of different lengths end in any order.
        for part, row in data.draw(st.sets(st.sampled_from(sorted(residents)), min_size=1)):
            scheduler.free(part, row)
    assert seen == list(range(prompts))


def test_a_prompt_that_waits_is_dropped_and_one_in_a_row_is_marked():
    scheduler = Scheduler(parts=1, rows=2, prompts=3, generations=4)
    scheduler.admit()
    assert scheduler.cancel(2)
    assert not scheduler.cancel(0)
    scheduler.end(0, int(scheduler.queue()[0][0, 1]), 2)
    ring, _, cancelled, closed = scheduler.queue()
    assert closed
    for row in range(2):
        assert cancelled[0, row].tolist() == ([True] * 4 if row == ring[0, 0] else [False, False, True, False])
    for part, row in list(scheduler.residents):
        scheduler.free(part, row)
    assert scheduler.done


def test_a_row_that_was_cancelled_is_free_for_the_next():
    scheduler = Scheduler(parts=1, rows=1, prompts=2, generations=1)
    scheduler.admit()
    scheduler.cancel(0)
    scheduler.free(0, 0)
    assert [prefill.prompt for prefill in scheduler.admit()] == [1]
    assert not scheduler.queue()[2].any()
