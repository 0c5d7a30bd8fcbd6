import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from audio_grpo.grpo import LossSettings, TokenScores, blocks, grpo_loss_fn
from audio_grpo.grpo.fused_loss import LogitsSettings, fused_loss
from audio_grpo.parallel.activations import MANY_TOKENS, Placement
from audio_grpo.parallel.mesh import MESH_AXES
from audio_grpo.types import GroupBatch, PromptBatch, Routes

GROUPS, GENERATIONS, LENGTH, WIDTH, VOCAB, TEMPERATURE = 4, 3, 7, 5, 12, 0.7
SETTINGS = {
    "grpo": LossSettings(beta=0.1, entropy_coef=0.3),
    "sequence": LossSettings(beta=0.0, importance_sampling_level="sequence", off_policy_mask_threshold=0.1),
    "cispo": LossSettings(loss_type="cispo", epsilon_high=5.0),
}


def inputs_of(seed=0):
    rng = np.random.default_rng(seed)
    tokens = (GROUPS, GENERATIONS, LENGTH)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    targets = jnp.asarray(rng.integers(0, VOCAB, tokens), jnp.int32)
    batch = GroupBatch(
        prompts=PromptBatch(jnp.zeros((GROUPS, 4), jnp.int32), jnp.full(GROUPS, 4, jnp.int32)),
        completion_tokens=targets,
        mask=jnp.asarray(rng.random(tokens) < 0.8),
        advantages=normal(GROUPS, GENERATIONS),
        token_weights=jnp.asarray(rng.random(tokens), jnp.float32),
        old_log_probs=-2 + 0.3 * normal(*tokens),
        reference_log_probs=-2 + 0.3 * normal(*tokens),
        sampler_log_probs=-2 + 0.3 * normal(*tokens),
        entropy_weights=jnp.asarray(rng.random(tokens), jnp.float32),
        routes=Routes(jnp.zeros((GROUPS, 4, 2), jnp.int8), jnp.zeros((*tokens, 2), jnp.int8)),
    )
    return normal(*tokens, WIDTH), 0.3 * normal(VOCAB, WIDTH), batch


def plain_loss(hidden, head, batch, loss_fn):
    """All logits at once, differentiated by JAX."""
    log_probabilities = jax.nn.log_softmax(jnp.einsum("bgcd,vd->bgcv", hidden, head) / TEMPERATURE)
    chosen = jnp.take_along_axis(log_probabilities, batch.completion_tokens[..., None], axis=-1)[..., 0]
    entropy = -(jnp.exp(log_probabilities) * log_probabilities).sum(axis=-1)
    return loss_fn(TokenScores(chosen, entropy), batch)


def how(chunk_size, mesh=None, vocab=VOCAB):
    """Of a chunk of so many tokens, whatever part of the vocabulary a device has."""
    place = Placement(mesh, MANY_TOKENS)
    chunk_bytes = chunk_size * 4 * vocab // place.size("vocab")
    return LogitsSettings(temperature=TEMPERATURE, chunk_bytes=chunk_bytes, place=place)


def gradients_of(loss, hidden, head):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5), a, b)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("chunk_size, block_logits", [(1, 1), (1, 40), (4 * LENGTH, 40), (1000, 1), (1000, 10**6)])
def test_loss_report_and_gradients_are_those_of_all_logits_at_once(settings, chunk_size, block_logits, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_LOGITS", block_logits)
    hidden, head, batch = inputs_of()
    loss_fn = partial(grpo_loss_fn, settings=settings)
    fused = partial(fused_loss, batch=batch, loss_fn=loss_fn, how=how(chunk_size))
    assert_close(
        gradients_of(lambda h, w: fused(h, w), hidden, head),
        gradients_of(lambda h, w: plain_loss(h, w, batch, loss_fn), hidden, head),
    )


@pytest.mark.parametrize("sizes", [(1, 4, 1, 1), (1, 2, 1, 2), (2, 1, 2, 1), (1, 1, 1, 4)])
@pytest.mark.parametrize("chunk_size", [1, 1000])
def test_devices_that_share_tokens_and_vocabulary_give_what_one_gives(sizes, chunk_size, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_LOGITS", 50)
    mesh = Mesh(np.asarray(jax.devices()).reshape(sizes), MESH_AXES)
    hidden, head, batch = inputs_of(1)
    loss_fn = partial(grpo_loss_fn, settings=SETTINGS["grpo"])
    alone, shared = (
        gradients_of(lambda h, w, mesh=mesh: fused_loss(h, w, batch, loss_fn, how(chunk_size, mesh)), hidden, head)
        for mesh in (None, mesh)
    )
    assert_close(alone, shared)


def test_the_value_alone_is_that_of_the_differentiated_loss():
    hidden, head, batch = inputs_of(2)
    loss_fn = partial(grpo_loss_fn, settings=SETTINGS["grpo"])
    value = jax.jit(lambda h, w: fused_loss(h, w, batch, loss_fn, how(LENGTH)))(hidden, head)
    assert_close(value, plain_loss(hidden, head, batch, loss_fn))


def large_program(*, head_learns, completions=8, length=16, vocab=4096):
    """The compiled gradients of a loss over a larger vocabulary, and what they are of."""
    shapes = {
        "hidden": jax.ShapeDtypeStruct((1, completions, length, 8), jnp.float32),
        "head": jax.ShapeDtypeStruct((vocab, 8), jnp.float32),
        "tokens": jax.ShapeDtypeStruct((1, completions, length), jnp.int32),
    }

    loss_fn = partial(grpo_loss_fn, settings=LossSettings())

    def total(hidden, head, tokens):
        ones = jnp.ones(tokens.shape, jnp.float32)
        prompts = PromptBatch(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
        batch = GroupBatch(prompts, tokens, ones > 0, ones[..., 0], ones)
        return fused_loss(hidden, head, batch, loss_fn, how(length, vocab=vocab))[0]

    learned = (0, 1) if head_learns else 0
    return jax.jit(jax.grad(total, argnums=learned)).lower(*shapes.values()).compile()


def products(program):
    """Matrix products in a program, each loop's counted once."""
    return len(re.findall(r" dot\(", program.as_text()))


def test_logits_are_made_once_and_a_frozen_head_costs_no_product():
    assert products(large_program(head_learns=True)) == 3
    assert products(large_program(head_learns=False)) == 2


def test_memory_does_not_grow_with_tokens_beyond_the_hidden_states():
    few, many = (
        large_program(head_learns=True, completions=completions).memory_analysis().temp_size_in_bytes
        for completions in (8, 512)
    )
    hidden_bytes = 4 * 8 * 16
    # The block that is at work is all of a chunk here, and there are a few of it.
    assert few < 6 * 4 * 16 * 4096
    assert many - few < 2 * (512 - 8) * hidden_bytes
