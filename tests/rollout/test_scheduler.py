from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.rollout.scheduler import Scheduler, membership


@given(
    parts=st.integers(1, 3),
    slots=st.integers(1, 12),
    rows=st.integers(1, 6),
    prompts=st.integers(0, 15),
    generations=st.integers(1, 6),
    data=st.data(),
)
def test_every_completion_runs_once_and_reads_its_own_prompt(parts, slots, rows, prompts, generations, data):
    width, sizes = min(generations, slots), {"slots": slots * parts, "rows": rows * parts, "parts": parts}
    scheduler = Scheduler(**sizes, prompts=prompts, generations=generations)
    cached: dict[int, int] = {}
    done: list[tuple[int, int]] = []
    while not scheduler.done:
        prefills, starts = scheduler.admit()
        for prefill in prefills:
            assert prefill.row not in {start.row for start in scheduler.running.values()} - {
                start.row for start in starts
            }, "a row was overwritten while it was read"
            cached[prefill.row] = prefill.prompt
        assert all(cached[start.row] == start.prompt for start in scheduler.running.values())
        assert len(scheduler.running) <= slots * parts
        members, place = membership(scheduler.running, **sizes, width=width)
        for slot, start in scheduler.running.items():
            part, local = divmod(slot, slots)
            assert start.row // rows == part
            assert place[part, local] // width == start.row % rows
            assert members[part].reshape(-1)[place[part, local]] == local
        finishing = data.draw(st.sets(st.sampled_from(sorted(scheduler.running)), min_size=1))
        done += [(start.prompt, start.sample) for start in map(scheduler.finish, finishing)]
    assert sorted(done) == [(p, g) for p in range(prompts) for g in range(generations)]


def test_a_prompt_is_prefilled_once_for_all_its_completions():
    scheduler = Scheduler(slots=2, rows=2, prompts=3, generations=5)
    prefilled = []
    while not scheduler.done:
        prefills, _ = scheduler.admit()
        prefilled += [prefill.prompt for prefill in prefills]
        scheduler.finish(next(iter(scheduler.running)))
    assert prefilled == [0, 1, 2]


def test_free_slots_never_wait_while_work_and_rows_are_left():
    scheduler = Scheduler(slots=6, rows=4, prompts=10, generations=2)
    scheduler.admit()
    assert len(scheduler.running) == 6
    scheduler.finish(0)
    scheduler.admit()
    assert len(scheduler.running) == 6
