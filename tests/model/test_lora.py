from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.errors import UserError
from audio_grpo.grpo import compute_log_probs
from audio_grpo.model import thinker
from audio_grpo.model.lora import lora_table, merge_adapters
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
        settings = {"audio_pad": AUDIO_PAD, "temperature": 1.0, "chunk_size": 64}
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
