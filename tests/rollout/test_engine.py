import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.grpo import compute_log_probs
from audio_grpo.model import thinker
from audio_grpo.model.spec import thinker_spec
from audio_grpo.rollout import OfflineEngine, Sampling, engine_settings
from audio_grpo.rollout.settings import workload_shape
from audio_grpo.types import PromptBatch
from small_model import AUDIO_PAD, SPECIAL, request_of, small_config

REQUESTS = [request_of(f"r{n}", n, seed=n) for n in (57, 100, 101, 180)]


def engine_of(model, **settings):
    config, weights = model
    return OfflineEngine(config, weights, special=SPECIAL, settings=replace(engine_settings(config), **settings))


def tokens_of(results):
    return [[completion.token_ids.tolist() for completion in result.completions] for result in results]


@pytest.fixture(scope="module")
def sampled(model):
    engine = engine_of(model)
    return engine, engine.batch_inference(REQUESTS)


def test_greedy_decoding_equals_repeated_full_forwards(model):
    config, weights = model
    engine = engine_of(model, sampling=Sampling(greedy=True), generations=1)
    results = engine.batch_inference(REQUESTS)
    run = jax.jit(partial(thinker.prefill, thinker_spec(config)), static_argnums=3)
    allowed = np.ones(256, bool)
    for first, end in SPECIAL.never_sampled:
        allowed[first:end] = False
    for request, result in zip(REQUESTS, results, strict=True):
        heard = engine.hear(engine._audio_batch([request], 180))
        tokens = request.tokens.tolist()
        for token in result.completions[0].token_ids:
            padded = np.zeros((1, 60), np.int32)
            padded[0, : len(tokens)] = tokens
            hidden, _ = run(weights, PromptBatch(jnp.asarray(padded), jnp.asarray([len(tokens)])), heard, AUDIO_PAD)
            logits = np.where(allowed, np.asarray(hidden[0] @ weights["lm_head.weight"].T), -np.inf)
            best, second = np.sort(logits)[::-1][:2]
            assert best - second < 1e-3 or token == logits.argmax()
            tokens.append(int(token))


def test_sampler_and_learner_agree_on_log_probabilities(model, sampled):
    config, weights = model
    engine, results = sampled
    tokens = np.zeros((len(REQUESTS), 40), np.int32)
    completions = np.zeros((len(REQUESTS), 3, 12), np.int32)
    for b, (request, result) in enumerate(zip(REQUESTS, results, strict=True)):
        tokens[b, : request.true_length] = request.tokens
        for g, completion in enumerate(result.completions):
            completions[b, g, : len(completion.token_ids)] = completion.token_ids
    scores = compute_log_probs(
        thinker_spec(config),
        weights,
        PromptBatch(jnp.asarray(tokens), jnp.asarray([r.true_length for r in REQUESTS])),
        engine.hear(engine._audio_batch(REQUESTS, 180)),
        jnp.asarray(completions),
        audio_pad=AUDIO_PAD,
        temperature=config.decode_sampling_temperature,
    )
    for b, result in enumerate(results):
        for g, completion in enumerate(result.completions):
            learner = scores.log_probs[b, g, : len(completion.token_ids)]
            np.testing.assert_allclose(completion.logprobs, learner, atol=1e-4)


def test_samples_depend_on_neither_slots_nor_bursts_nor_order(model, sampled):
    _, results = sampled
    for slots, burst in ((1, 3), (5, 1), (64, 12)):
        engine = engine_of(model, max_slots=slots, burst=burst)
        assert tokens_of(engine.batch_inference(REQUESTS)) == tokens_of(results)
    backwards = engine_of(model).batch_inference(REQUESTS[::-1])
    assert [result.id for result in backwards] == [request.id for request in REQUESTS[::-1]]
    assert tokens_of(backwards[::-1]) == tokens_of(results)


def test_samples_of_a_prompt_differ_from_their_first_token_on(sampled):
    _, results = sampled
    firsts = [completion.token_ids[0] for result in results for completion in result.completions]
    assert len(set(firsts)) > len(results)


def test_another_seed_gives_other_samples(sampled):
    engine, results = sampled
    assert tokens_of(engine.batch_inference(REQUESTS, seed=1)) != tokens_of(results)


def test_neighbours_and_padding_do_not_change_a_result(sampled):
    engine, results = sampled
    alone = engine.batch_inference(REQUESTS[:1])
    assert tokens_of(alone) == tokens_of(results[:1])
    for a, b in zip(alone[0].completions, results[0].completions, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_clip_is_heard_and_its_prompt_prefilled_once_whatever_g(model):
    engine = engine_of(model, max_slots=4, generations=6)
    heard, prefilled = [], []
    programs, hear = engine._programs, engine.hearing.program
    engine_rows = workload_shape(engine.settings, 1, len(REQUESTS), 6).rows
    prefill = programs.prefill
    engine.hearing.program = lambda w, audio: heard.extend(n for n in audio.frames if n) or hear(w, audio)
    programs.__dict__["prefill"] = lambda w, state, new: (
        prefilled.extend(r for r in new.row.flatten() if r < engine_rows) or prefill(w, state, new)
    )
    engine.batch_inference(REQUESTS)
    assert heard == [request.audio_features.shape[1] for request in REQUESTS]
    assert len(prefilled) == len(REQUESTS)
    assert engine.hearing.clips == engine.last_stats.prompts == len(REQUESTS)


def test_a_stop_token_ends_a_completion_and_is_its_last_token(model):
    config, weights = model
    special = replace(SPECIAL, stop=tuple(range(100, 256)))
    results = OfflineEngine(config, weights, special=special).batch_inference(REQUESTS)
    for completion in (c for result in results for c in result.completions):
        stopped = completion.finish_reason == "stop"
        assert (completion.token_ids[-1] >= 100) == stopped
        assert (completion.token_ids[:-1] < 100).all()
        assert stopped or len(completion.token_ids) == 12


def test_media_and_padding_tokens_are_never_sampled(model):
    special = replace(SPECIAL, never_sampled=((0, 120), (124, 256)), stop=(120,))
    config, weights = model
    results = OfflineEngine(config, weights, special=special).batch_inference(REQUESTS)
    assert {int(t) for r in results for c in r.completions for t in c.token_ids} <= {120, 121, 122, 123}


def test_a_prompt_without_audio_is_answered(sampled):
    engine, _ = sampled
    text_only = replace(REQUESTS[0], tokens=np.asarray([1, 7, 9], np.int32), true_length=3, audio_features=None)
    assert len(engine.batch_inference([text_only])[0].completions) == 3


def test_no_requests_give_no_results(sampled):
    assert sampled[0].batch_inference([]) == []


def test_a_request_whose_placeholders_do_not_match_its_audio_fails_alone(sampled):
    wrong = replace(
        REQUESTS[0], tokens=np.append(REQUESTS[0].tokens, AUDIO_PAD), true_length=len(REQUESTS[0].tokens) + 1
    )
    failed, answered = sampled[0].batch_inference([wrong, REQUESTS[1]])
    assert not failed.completions and re.search(r"r57 has 9 audio placeholders .* give 8 audio tokens", failed.error)
    assert tokens_of([answered]) == tokens_of(sampled[1][1:2]) and answered.error is None


def test_a_prompt_that_is_too_long_is_refused(sampled):
    (failed,) = sampled[0].batch_inference([request_of("long", 100, text=60)])
    assert re.search(r"long.*true_length .*40", failed.error)


def test_audio_mask_and_padding_of_features_change_nothing(sampled):
    engine, results = sampled
    features = np.pad(REQUESTS[0].audio_features, ((0, 0), (0, 43)))
    padded = replace(REQUESTS[0], audio_features=features, audio_mask=np.arange(100) < 57)
    assert tokens_of(engine.batch_inference([padded])) == tokens_of(results[:1])


def test_four_devices_sample_what_one_does(model, sampled):
    from audio_grpo.parallel.mesh import create_mesh

    config = small_config(num_experts=model[0].num_experts, ici_fsdp_parallelism=2, ici_tensor_parallelism=2)
    engine = OfflineEngine(config, model[1], special=SPECIAL, mesh=create_mesh(config))
    assert tokens_of(engine.batch_inference(REQUESTS)) == tokens_of(sampled[1])
