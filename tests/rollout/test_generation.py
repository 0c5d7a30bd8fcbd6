"""Streaming, cancelling and refilling, seen from outside."""

from dataclasses import replace

import numpy as np
import pytest

from audio_grpo.rollout import OfflineEngine, engine_settings
from audio_grpo.rollout.generation import CANCELLED
from small_model import SPECIAL, random_weights, request_of, small_config

REQUESTS = [request_of(f"r{i}", 57, seed=i) for i in range(12)]
LIMITS = [1 + (5 * i) % 12 for i in range(12)]


@pytest.fixture(scope="module")
def engine():
    config = small_config()
    settings = replace(engine_settings(config), max_slots=4, burst=3)
    return OfflineEngine(config, random_weights(config), special=replace(SPECIAL, stop=()), settings=settings)


def lengths_of(result):
    return [len(completion.token_ids) for completion in result.completions]


def test_limits_hold_for_each_request_and_change_no_token(engine):
    whole = engine.batch_inference(REQUESTS)
    short = engine.batch_inference(REQUESTS, max_new_tokens=LIMITS)
    for limit, a, b in zip(LIMITS, whole, short, strict=True):
        assert lengths_of(b) == [limit] * 3
        for long, cut in zip(a.completions, b.completions, strict=True):
            np.testing.assert_array_equal(long.token_ids[:limit], cut.token_ids)


def test_slots_are_refilled_within_a_burst(engine):
    engine.batch_inference(REQUESTS, max_new_tokens=LIMITS)
    stats = engine.last_stats
    assert stats.tokens == 3 * sum(LIMITS)
    assert stats.prompts == len(REQUESTS)
    # Four slots; only the last completions leave some of them idle.
    assert stats.utilisation > 0.85
    assert stats.slot_steps % 4 == 0


def test_results_stream_in_the_order_in_which_they_are_done_and_all_arrive(engine):
    whole = engine.batch_inference(REQUESTS, max_new_tokens=LIMITS)
    streamed = list(engine.stream(REQUESTS, max_new_tokens=LIMITS))
    assert sorted(i for i, _ in streamed) == list(range(12))
    for i, result in streamed:
        assert result.id == f"r{i}" and lengths_of(result) == lengths_of(whole[i])


def test_a_stream_that_is_closed_leaves_the_engine_fit_for_the_next(engine):
    stream = engine.stream(REQUESTS)
    next(stream)
    stream.close()
    assert len(engine.batch_inference(REQUESTS[:2])) == 2


def test_slots_that_nothing_waits_for_are_given_up_and_change_no_token():
    config = small_config()
    weights = random_weights(config)
    limits = [1 + (7 * i) % 12 for i in range(12)]
    special = replace(SPECIAL, stop=())

    def answered(slots, burst):
        settings = replace(engine_settings(config), max_slots=slots, burst=burst)
        engine = OfflineEngine(config, weights, special=special, settings=settings)
        return engine, engine.batch_inference(REQUESTS, max_new_tokens=limits)

    wide, results = answered(36, 2)
    _, expected = answered(4, 3)
    for a, b in zip(results, expected, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            np.testing.assert_array_equal(x.token_ids, y.token_ids)
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-5)
    # 36 slots for all 12 steps would be 432 slot steps; from 18 completions on there are 18, from 9 on 9.
    left = [3 * sum(limit > step for limit in limits) for step in range(12)]
    assert wide.last_stats.slot_steps == sum(36 if n > 18 else 18 if n > 9 else 9 for n in left)
    assert wide.last_stats.slots == 36


@pytest.mark.parametrize("dropped", [[11], [1], [2], [3], [1, 2, 3], [2, 3, 4, 5, 11], list(range(1, 12))])
def test_cancelled_requests_end_alone_whether_they_wait_are_queued_or_decode(engine, dropped):
    """Four slots, four rows: prompts 1 to 3 decode or are queued when prompt 0 is done, later ones wait."""
    expected = engine.batch_inference(REQUESTS)
    stream = engine.stream(REQUESTS)
    results = {}
    for i, result in stream:
        if not results:
            assert i == 0
            for index in dropped:
                stream.cancel(index)
        results[i] = result
    assert sorted(results) == list(range(12))
    assert {i for i, result in results.items() if result.error == CANCELLED} == set(dropped)
    for i, result in results.items():
        if result.error is None:
            for a, b in zip(result.completions, expected[i].completions, strict=True):
                np.testing.assert_array_equal(a.token_ids, b.token_ids)


def test_what_listening_raises_reaches_the_caller(engine):
    prompts = np.zeros((1, 40), np.int32)

    def listen(_indices):
        raise FileNotFoundError("clip.wav")

    from audio_grpo.types import PromptBatch

    with pytest.raises(FileNotFoundError, match=r"clip\.wav"):
        list(engine.start(PromptBatch(prompts, np.asarray([5], np.int32)), listen, ["x"]))


def test_nothing_is_compiled_again_for_other_requests_of_the_same_number(engine):
    engine.batch_inference(REQUESTS)
    programs = engine._programs
    compiled = (engine.hearing.program, programs.prefill, programs.burst, programs.narrow)
    before = [program._cache_size() for program in compiled]
    engine.batch_inference([request_of(f"n{i}", 57, seed=50 + i, text=2) for i in range(12)], seed=4)
    assert [program._cache_size() for program in compiled] == before
