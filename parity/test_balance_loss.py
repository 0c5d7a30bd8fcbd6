"""The router's auxiliary loss and its gradient, against transformers' own on the same logits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import Array, Float
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import load_balancing_loss_func

from audio_grpo.grpo.expert_load import balance_loss
from audio_grpo.model.router import load_of, route
from parity.cases import CASES

LAYERS, TOKENS, EXPERTS = 3, 40, 6
SPEC = next(case.spec.decoder for case in CASES if case.spec.decoder.experts)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_balance_loss_is_transformers(top_k: int) -> None:
    rng = np.random.default_rng(top_k)
    logits = rng.normal(size=(LAYERS, TOKENS, EXPERTS)).astype(np.float32)
    real = rng.random(TOKENS) < 0.7
    spec = replace(SPEC, experts=EXPERTS, experts_per_token=top_k)
    identity = {"mlp.gate.weight": jnp.eye(EXPERTS)}

    def ours(logits: Float[Array, "L tokens E"]) -> Float[Array, ""]:
        loads = [load_of(route(spec, identity, layer, wide=False), jnp.asarray(real)) for layer in logits]
        return balance_loss(jax.tree.map(lambda *each: jnp.stack(each), *loads))

    theirs = [torch.tensor(layer, requires_grad=True) for layer in logits]
    expected = load_balancing_loss_func(tuple(theirs), EXPERTS, top_k, torch.tensor(real)[None])
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for layer, of_layer in zip(gradient, theirs, strict=True):
        assert of_layer.grad is not None
        np.testing.assert_allclose(layer, of_layer.grad.numpy(), atol=1e-6)
