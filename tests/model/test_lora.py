from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.errors import UserError
from audio_grpo.grpo import compute_log_probs
from audio_grpo.model import thinker
from audio_grpo.model.lora import drop_inputs, lora_table, merge_adapters
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import initialize
from audio_grpo.types import AudioBatch, PromptBatch
from small_model import AUDIO_PAD, random_weights, request_of, small_config

CONFIG = small_config(lora_rank=3, lora_alpha=6.0)
SPEC = thinker_spec(CONFIG)
TABLE = thinker.thinker_table(SPEC)
ATTENTION = ["model.layers.*.self_attn.*_proj"]


@pytest.fixture(scope="module")
def score():
    request = request_of("r", 100)
    prompts = PromptBatch(jnp.asarray(request.tokens)[None], jnp.asarray([request.true_length]))
    audio = AudioBatch(jnp.asarray(request.audio_features)[None], jnp.asarray([100]))
    completion = jnp.asarray([[[9, 8, 7, 2]]])

    @partial(jax.jit)
    def run(weights):
        heard = thinker.hear(SPEC, weights, audio)
        settings = {"audio_pad": AUDIO_PAD, "temperature": 1.0}
        return compute_log_probs(SPEC, weights, prompts, heard, completion, **settings).log_probs

    return run


def test_a_fresh_adapter_changes_nothing(score):
    weights = random_weights(CONFIG)
    adapters = initialize(lora_table(TABLE, rank=3, targets=ATTENTION), jax.random.key(1), jnp.float32)
    np.testing.assert_allclose(score(weights), score({**weights, **adapters}), atol=2e-6)


@pytest.mark.parametrize("targets", [ATTENTION, ["audio_tower.layers.*.fc?", "model.layers.*.mlp.*_proj"]])
def test_merged_adapters_equal_adapters_at_work(score, targets):
    weights = random_weights(CONFIG)
    table = lora_table(TABLE, rank=3, targets=targets)
    rng = np.random.default_rng(0)
    adapters = {key: jnp.asarray(0.2 * rng.normal(size=w.shape), jnp.float32) for key, w in table.items()}
    merged = merge_adapters({**weights, **adapters}, SPEC.lora_scale)
    assert merged.keys() == weights.keys()
    assert np.abs(score(weights) - score(merged)).max() > 1e-2
    np.testing.assert_allclose(score({**weights, **adapters}), score(merged), atol=2e-5)


def test_merged_adapters_of_experts_equal_adapters_at_work():
    """Through prefill and scoring of a whole model, each expert with an adapter of its own."""
    config = small_config(lora_rank=3, lora_alpha=6.0, num_experts=4)
    spec, weights = thinker_spec(config), random_weights(config)
    table = lora_table(thinker.thinker_table(spec), rank=3, targets=["model.layers.*.mlp.*_proj"])
    name = "model.layers.*.mlp.experts.*.down_proj"
    assert (table[f"{name}.lora_A.weight"].shape, table[f"{name}.lora_B.weight"].shape) == (
        (2, 4, 3, 24),
        (2, 4, 32, 3),
    )
    assert len(table) == 6
    rng = np.random.default_rng(0)
    adapters = {key: jnp.asarray(0.3 * rng.normal(size=w.shape), jnp.float32) for key, w in table.items()}
    merged = merge_adapters({**weights, **adapters}, spec.lora_scale)
    by_hand = weights[f"{name}.weight"] + 2.0 * np.einsum(
        "leor,leri->leoi", adapters[f"{name}.lora_B.weight"], adapters[f"{name}.lora_A.weight"]
    )
    np.testing.assert_allclose(merged[f"{name}.weight"], by_hand, atol=1e-5)
    tokens = np.random.default_rng(1).integers(6, 200, (2, 12))
    prompts = PromptBatch(jnp.asarray(tokens), jnp.asarray([12, 9]))
    completions = jnp.asarray(np.random.default_rng(2).integers(6, 200, (2, 3, 6)))

    @jax.jit
    def score(weights):
        settings = {"audio_pad": AUDIO_PAD, "temperature": 1.0}
        silence = jnp.zeros((2, 0, 32))
        return compute_log_probs(spec, weights, prompts, silence, completions, **settings).log_probs

    assert np.abs(score(weights) - score(merged)).max() > 1e-2
    np.testing.assert_allclose(score({**weights, **adapters}), score(merged), atol=5e-5)


def test_dropout_leaves_out_whole_inputs_of_adapters_and_weighs_the_others_more():
    table = lora_table(thinker.thinker_table(thinker_spec(small_config(num_experts=4))), rank=3, targets=["*_proj"])
    weights = initialize(table, jax.random.key(1), jnp.float32)
    dropped = drop_inputs(weights, jax.random.key(0), 0.25)
    shares = {}
    for name, value in weights.items():
        if name.endswith(".lora_B.weight"):
            assert dropped[name] is value
            continue
        kept = np.asarray(dropped[name] != 0)
        assert (kept == kept[..., :1, :]).all()
        np.testing.assert_allclose(dropped[name], np.where(kept, value / 0.75, 0), rtol=1e-6)
        shares[name] = kept[..., 0, :]
    assert np.concatenate([kept.ravel() for kept in shares.values()]).mean() == pytest.approx(0.75, abs=0.03)
    # Layers, experts and maps draw for themselves.
    experts = shares["model.layers.*.mlp.experts.*.up_proj.lora_A.weight"].reshape(8, 32)
    assert len({row.tobytes() for row in experts}) == 8
    assert (experts != shares["model.layers.*.mlp.experts.*.gate_proj.lora_A.weight"].reshape(8, 32)).any()


def test_dropout_keeps_what_an_adapter_adds_on_average():
    a = {"x.lora_A.weight": jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)}
    draws = jax.vmap(lambda key: drop_inputs(a, key, 0.5)["x.lora_A.weight"])(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(draws.mean(axis=0), a["x.lora_A.weight"], atol=0.12)


def test_the_scale_is_alpha_over_rank():
    assert SPEC.lora_scale == 2.0
    table = lora_table(TABLE, rank=3, targets=ATTENTION)
    name = "model.layers.*.self_attn.q_proj"
    a, b = np.ones(table[f"{name}.lora_A.weight"].shape), np.ones(table[f"{name}.lora_B.weight"].shape)
    weights = {f"{name}.weight": np.zeros((2, 32, 32)), f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    merged = merge_adapters({key: jnp.asarray(value, jnp.float32) for key, value in weights.items()}, 2.0)
    np.testing.assert_array_equal(merged[f"{name}.weight"], np.full((2, 32, 32), 2.0 * 3))


@pytest.mark.parametrize("pattern", ["model.layers.*.self_attn.z_proj", "model.norm", "model.embed_tokens"])
def test_a_pattern_without_an_adaptable_weight_is_refused(pattern):
    with pytest.raises(UserError, match=pattern.replace("*", r"\*")):
        lora_table(TABLE, rank=3, targets=[pattern])
