import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.model import experts
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import initialize, scope
from audio_grpo.model.thinker import thinker_table
from small_model import small_config

SPEC = thinker_spec(small_config(num_experts=6)).decoder


@pytest.fixture(scope="module")
def layer():
    spec = thinker_spec(small_config(num_experts=6))
    weights = initialize(thinker_table(spec), jax.random.key(1), jnp.float32)
    return {key: value[0] for key, value in scope(weights, "model.layers.*.").items()}


def every_expert_by_hand(layer, x):
    logits = x @ layer["mlp.gate.weight"].T
    probabilities = jax.nn.softmax(logits, axis=-1)
    y = np.zeros_like(x)
    for n, row in enumerate(x):
        chosen = np.argsort(-probabilities[n], kind="stable")[: SPEC.experts_per_token]
        shares = probabilities[n][chosen] / probabilities[n][chosen].sum()
        for share, e in zip(shares, chosen, strict=True):
            gate, up, down = (layer[f"mlp.experts.*.{name}_proj.weight"][e] for name in ("gate", "up", "down"))
            y[n] += share * (down @ (jax.nn.silu(gate @ row) * (up @ row)))
    return y


@pytest.mark.parametrize("tokens", [1, 5, 70, 200])
def test_each_token_gets_the_weighted_sum_of_its_top_experts(layer, tokens):
    x = np.random.default_rng(tokens).normal(size=(tokens, SPEC.width)).astype(np.float32)
    np.testing.assert_allclose(
        experts.experts_mlp(SPEC, layer, jnp.asarray(x)), every_expert_by_hand(layer, x), atol=1e-5
    )


@pytest.mark.parametrize("sizes", [[96, 0, 0, 0, 0, 0], [1, 40, 0, 33, 20, 2], [16, 16, 16, 16, 16, 16]])
def test_blocks_on_cpu_equal_grouped_products_on_accelerators(layer, sizes):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(96, SPEC.width)), jnp.float32)
    matrices = [layer[f"mlp.experts.*.{name}_proj.weight"] for name in ("gate", "up", "down")]

    def run(grouping):
        def total(rows, *matrices):
            y = grouping(rows, jnp.asarray(sizes), *matrices)
            return (y * jnp.cos(y)).sum(), y

        return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(rows, *matrices)

    blocked, ragged = run(experts._blocked_experts), run(experts._ragged_experts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), blocked, ragged)
