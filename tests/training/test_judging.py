"""Prompts are judged while others are still being answered, with the same result as afterwards."""

import threading
from concurrent.futures import CancelledError
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_runs import tiny_config

from audio_grpo.config import Config
from audio_grpo.rewards import RewardFunction, score_completions
from audio_grpo.text import ReasoningTags, load_tokenizer
from audio_grpo.training.judging import Judging
from audio_grpo.types import Completion, RequestResult

B, G = 5, 3
REFERENCES = [f"seven lamps and {number} more" for number in ("one", "two", "three", "four", "five")]
PATIENCE = 30
"""Seconds that a test waits for another thread at most."""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    config: Config = tiny_config(tmp_path_factory.mktemp("judging"))
    tokenizer = load_tokenizer("audio-grpo/tiny")
    return SimpleNamespace(config=config, tokenizer=tokenizer, tags=ReasoningTags.from_config(config))


@pytest.fixture(scope="module")
def batch(session):
    tokens = [session.tokenizer.encode(f"Transcribe {number}.") for number in range(B)]
    longest = max(map(len, tokens))
    return {
        "id": [f"clip {number}" for number in range(B)],
        "ground_truth_text": REFERENCES,
        "language": [None] * B,
        "audio_seconds": np.arange(B, dtype=np.float32),
        "ar": np.array([row + [0] * (longest - len(row)) for row in tokens], np.int32),
        "ar_true_length": np.array([len(row) for row in tokens], np.int32),
    }


def texts_of(prompt):
    """Right, and with a word less for each further sample."""
    words = REFERENCES[prompt].split()
    return [" ".join(words[sample:]) for sample in range(G)]


def answered(session, prompt):
    completions = []
    for text in texts_of(prompt):
        ids = np.array([*session.tokenizer.encode(text), session.tokenizer.token_id("<|im_end|>")], np.int32)
        zeros = np.zeros(len(ids), np.float32)
        completions.append(Completion(token_ids=ids, logprobs=zeros, log_kept=zeros, finish_reason="stop"))
    return RequestResult(id=f"clip {prompt}", completions=tuple(completions))


def lengths(completions, audio_seconds, prompts, completion_ids, **_):
    rows = zip(completions, audio_seconds, prompts, completion_ids, strict=True)
    return [len(text) + 100.0 * float(seconds) + len(prompt) + 0.1 * len(ids) for text, seconds, prompt, ids in rows]


def test_the_order_in_which_prompts_are_done_changes_nothing(session, batch):
    functions = [RewardFunction("lengths", lengths)]
    with Judging(session, functions, batch) as judging:
        for prompt in (3, 0, 4, 2, 1):
            judging.take(prompt, answered(session, prompt))
        table, answers = judging.result()
    at_once = score_completions(
        functions,
        prompts=[f"Transcribe {number}." for number in range(B)],
        completions=[texts_of(prompt) for prompt in range(B)],
        completion_ids=[[c.token_ids.tolist() for c in answered(session, prompt).completions] for prompt in range(B)],
        columns={"audio_seconds": list(batch["audio_seconds"])},
        config=session.config,
    )
    np.testing.assert_array_equal(table.values, at_once.values)
    assert [[answer.answer for answer in group] for group in answers] == [texts_of(prompt) for prompt in range(B)]
    assert [[answer.words.deletions for answer in group] for group in answers] == [[0, 1, 2]] * B


def test_a_prompt_is_judged_before_the_others_are_done(session, batch):
    judged = threading.Event()

    def telling(completions, **_):
        judged.set()
        return [0.0] * len(completions)

    with Judging(session, [RewardFunction("telling", telling)], batch) as judging:
        judging.take(2, answered(session, 2))
        assert judged.wait(PATIENCE)


def test_sampling_goes_on_while_a_prompt_is_judged(session, batch):
    taken = threading.Event()

    def slow(completions, **_):
        assert taken.wait(PATIENCE)
        return [1.0] * len(completions)

    with Judging(session, [RewardFunction("slow", slow)], batch) as judging:
        for prompt in range(B):
            judging.take(prompt, answered(session, prompt))
        taken.set()
        assert (judging.result().rewards.values == 1).all()


def test_what_a_reward_function_raises_comes_through_and_no_thread_is_left(session, batch):
    def failing(**_):
        raise KeyError("answer")

    with (
        pytest.raises(KeyError, match="answer") as caught,
        Judging(session, [RewardFunction("failing", failing)], batch) as judging,
    ):
        for prompt in range(B):
            judging.take(prompt, answered(session, prompt))
        judging.result()
    assert "reward function failing" in caught.value.__notes__[0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("judging")]


def test_an_infinite_reward_is_no_number(session, batch):
    functions = [RewardFunction("odd", lambda completions, **_: [float("inf"), *[0.0] * (len(completions) - 1)])]
    with Judging(session, functions, batch) as judging:
        for prompt in range(B):
            judging.take(prompt, answered(session, prompt))
        values = judging.result().rewards.values
    assert np.isnan(values[0, :, 0]).all()
    assert (values[0, :, 1:] == 0).all()


def test_once_cancelled_no_further_prompt_is_taken(session, batch):
    cancelled = threading.Event()
    with Judging(session, [lengths], batch, cancelled) as judging:
        judging.take(0, answered(session, 0))
        cancelled.set()
        with pytest.raises(CancelledError):
            judging.take(1, answered(session, 1))
