import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.audio import audio_token_count
from audio_grpo.model import audio_tower, thinker
from audio_grpo.model.decoder import LAYERS, decoder_layer
from audio_grpo.model.layers import rms_norm
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import scope
from audio_grpo.model.thinker import group_forward
from audio_grpo.parallel.activations import MANY_TOKENS, Placement
from audio_grpo.types import AudioBatch, PromptBatch
from small_model import AUDIO_PAD, random_weights, request_of, small_config

FRAMES = (57, 100, 101, 230)
hear = jax.jit(thinker.hear, static_argnums=0)
prefill = jax.jit(thinker.prefill, static_argnums=(0, 4))


def clips(frames, padded):
    features = np.zeros((len(frames), 128, padded), np.float32)
    for i, n in enumerate(frames):
        features[i, :, :n] = np.random.default_rng(n).normal(size=(128, n))
    return AudioBatch(jnp.asarray(features), jnp.asarray(frames))


def prompt_batch(length):
    requests = [request_of(f"r{n}", n, seed=n) for n in FRAMES]
    tokens = np.zeros((len(requests), length), np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: request.true_length] = request.tokens
    return PromptBatch(jnp.asarray(tokens), jnp.asarray([r.true_length for r in requests])), clips(FRAMES, 300)


@pytest.mark.parametrize("padded", [300, 777, 1700])
def test_a_clip_sounds_the_same_alone_and_padded_in_a_batch(model, padded):
    config, weights = model
    spec = thinker_spec(config)
    frames = (57, 99, 100, 101, 230, 300)
    together = hear(spec, weights, clips(frames, padded))
    for row, n in zip(together, frames, strict=True):
        alone = hear(spec, weights, clips((n,), n))[0]
        count = int(audio_token_count(n))
        np.testing.assert_allclose(row[:count], alone[:count], atol=1e-5)


def test_attention_of_the_tower_stays_within_windows_of_eight_seconds(model):
    config, weights = model
    spec = thinker_spec(config)
    audio = clips((1700,), 1700)
    changed = audio._replace(features=audio.features.at[0, :, 850].add(3.0))
    before, after = (np.asarray(hear(spec, weights, x)[0]) for x in (audio, changed))
    differs = np.abs(before - after).max(axis=1) > 0
    assert differs[104:208].all()
    assert not differs[:104].any()
    assert not differs[208:].any()


def test_padding_beyond_the_frames_is_not_heard(model):
    config, weights = model
    audio = clips((150,), 300)
    noisy = audio._replace(features=audio.features.at[:, :, 150:].set(99.0))
    spec = thinker_spec(config)
    np.testing.assert_array_equal(hear(spec, weights, audio), hear(spec, weights, noisy))


def test_padding_of_prompts_changes_nothing(model):
    config, weights = model
    spec = thinker_spec(config)
    results = []
    for length in (40, 64):
        prompts, audio = prompt_batch(length)
        results.append(prefill(spec, weights, prompts, hear(spec, weights, audio), AUDIO_PAD)[0])
    np.testing.assert_allclose(*results, atol=1e-5)


def test_audio_reaches_the_last_token(model):
    config, weights = model
    spec = thinker_spec(config)
    prompts, audio = prompt_batch(40)
    silent = audio._replace(features=jnp.zeros_like(audio.features))
    heard, unheard = (prefill(spec, weights, prompts, hear(spec, weights, x), AUDIO_PAD)[0] for x in (audio, silent))
    assert np.abs(heard - unheard).max() > 1e-3


def test_a_group_equals_its_completions_run_one_by_one(model):
    """Values and gradients: the shared prompt is an economy, not an approximation."""
    config, weights = model
    spec = thinker_spec(config)
    prompts, audio = prompt_batch(40)
    heard = hear(spec, weights, audio)
    completions = np.random.default_rng(3).integers(6, 200, (len(FRAMES), 3, 7))
    completions = jnp.asarray(completions)
    probe = np.random.default_rng(4).normal(size=(len(FRAMES), 3, 7, spec.decoder.width)).astype(np.float32)

    def together(weights):
        return group_forward(spec, weights, prompts, heard, completions, AUDIO_PAD).hidden

    def one_by_one(weights):
        """Each prompt with each completion as one ordinary causal sequence."""
        place = Placement(None, MANY_TOKENS)
        rows, columns, length = completions.shape
        sequences = np.zeros((rows, columns, 40 + length), np.int32)
        for b, n in enumerate(np.asarray(prompts.true_length)):
            sequences[b, :, :n] = np.asarray(prompts.tokens)[b, :n]
            sequences[b, :, n : n + length] = np.asarray(completions)[b]
        whole = PromptBatch(
            jnp.asarray(sequences.reshape(rows * columns, -1)), jnp.repeat(prompts.true_length, columns)
        )
        stream = thinker._prompt_stream(spec, weights, whole, jnp.repeat(heard, columns, axis=0), AUDIO_PAD, place)
        x, _ = jax.lax.scan(
            lambda x, w: (decoder_layer(spec.decoder, w, stream._replace(x=x), place, thinker._causal)[0], None),
            stream.x,
            scope(weights, LAYERS),
        )
        index = whole.true_length[:, None] - 1 + jnp.arange(length)
        hidden = jnp.take_along_axis(rms_norm(x, weights["model.norm.weight"], 1e-6), index[..., None], axis=1)
        return hidden.reshape(rows, columns, length, -1)

    def value_and_gradient(run):
        return jax.jit(jax.value_and_grad(lambda w: (run(w) * probe).sum()))(weights)

    (a, gradient_a), (b, gradient_b) = value_and_gradient(together), value_and_gradient(one_by_one)
    np.testing.assert_allclose(a, b, rtol=1e-4)
    for key in gradient_a:
        scale = max(1.0, float(jnp.abs(gradient_b[key]).max()))
        np.testing.assert_allclose(gradient_a[key] / scale, gradient_b[key] / scale, atol=1e-5, err_msg=key)


def test_remat_does_not_change_gradients():
    gradients = []
    for policy in ("full", "none"):
        config = small_config(remat_policy=policy)
        weights, spec = random_weights(config), thinker_spec(config)
        prompts, audio = prompt_batch(40)
        completions = jnp.full((len(FRAMES), 2, 4), 9)

        def loss(w, spec=spec, prompts=prompts, audio=audio, completions=completions):
            hidden = group_forward(spec, w, prompts, hear(spec, w, audio), completions, AUDIO_PAD).hidden
            return jnp.square(hidden).sum()

        gradients.append(jax.jit(jax.grad(loss))(weights))
    for key, a in gradients[0].items():
        np.testing.assert_allclose(
            a, gradients[1][key], rtol=2e-3, atol=1e-4 * float(jnp.abs(a).max() + 1), err_msg=key
        )


@pytest.mark.parametrize("height, width", [(8, 8), (7, 5), (1, 2)])
def test_nine_shifted_products_are_a_convolution(height, width):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(4, 3, 3, 3)), jnp.float32)
    np.testing.assert_allclose(audio_tower.shifted_products(x, kernel), audio_tower._convolve(x, kernel), atol=1e-5)
