from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.errors import UserError
from audio_grpo.rollout import OfflineEngine, engine_settings
from audio_grpo.rollout.stop_strings import StopStrings
from audio_grpo.text import Tokenizer
from small_model import SPECIAL, random_weights, request_of, small_config


def letters(ids):
    return "".join(chr(97 + i % 3) for i in ids)


@given(tokens=st.lists(st.integers(0, 2), max_size=12), strings=st.lists(st.text("abc", min_size=1, max_size=3)))
def test_the_end_is_the_first_token_that_completes_a_string(tokens, strings):
    text = letters(tokens)
    ends = [text.find(string) + len(string) for string in strings if string in text]
    assert StopStrings(tuple(strings), letters).end(np.asarray(tokens, np.int32)) == min(ends, default=None)


class Letters(Tokenizer):
    """A tokenizer of three letters."""

    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens
        return letters(ids)


@pytest.mark.parametrize("burst", [1, 4, 12])
def test_completions_end_with_the_string_and_their_slots_are_free_for_others(burst):
    config = small_config()
    weights = random_weights(config)
    requests = [request_of(f"r{i}", 57, seed=i) for i in range(6)]
    settings = replace(engine_settings(config), max_slots=4, burst=burst)

    def answered(strings):
        engine = OfflineEngine(
            config,
            weights,
            special=replace(SPECIAL, stop=()),
            settings=replace(settings, stop_strings=strings),
            tokenizer=Letters("letters", tokenizers.Tokenizer(tokenizers.models.BPE())),
        )
        return engine, engine.batch_inference(requests)

    _, whole = answered(())
    engine, cut = answered(("ab", "cc"))
    stopped = 0
    for a, b in zip(whole, cut, strict=True):
        for long, short in zip(a.completions, b.completions, strict=True):
            text = letters(long.token_ids)
            ends = [text.find(string) + 2 for string in ("ab", "cc") if string in text]
            assert len(short.token_ids) == min(ends, default=12)
            np.testing.assert_array_equal(short.token_ids, long.token_ids[: len(short.token_ids)])
            np.testing.assert_allclose(short.logprobs, long.logprobs[: len(short.token_ids)], atol=1e-5)
            assert short.finish_reason == ("stop" if ends else "length")
            stopped += bool(ends)
    assert stopped > 6
    if burst == 1:
        assert engine.last_stats.tokens < sum(12 for result in whole for _ in result.completions)


def test_stop_strings_need_a_tokenizer():
    config = small_config(stop_strings=["</answer>"])
    with pytest.raises(UserError, match=r"stop_strings.*</answer>.*tokenizer"):
        OfflineEngine(config, {}, special=SPECIAL)
