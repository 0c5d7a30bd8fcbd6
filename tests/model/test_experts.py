import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.model import experts, grouped
from audio_grpo.model.lora import lora_table, merge_adapters
from audio_grpo.model.router import route
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import initialize, scope
from audio_grpo.model.thinker import thinker_table
from audio_grpo.parallel.activations import FEW_TOKENS, MANY_TOKENS, Placement
from audio_grpo.parallel.mesh import create_mesh
from small_model import small_config

ANYWHERE = Placement(None, MANY_TOKENS)
NAMES = ("gate_proj", "up_proj", "down_proj")

SPEC = thinker_spec(small_config(num_experts=6)).decoder


@pytest.fixture(scope="module")
def layer():
    spec = thinker_spec(small_config(num_experts=6))
    weights = initialize(thinker_table(spec), jax.random.key(1), jnp.float32)
    return {key: value[0] for key, value in scope(weights, "model.layers.*.").items()}


@pytest.fixture(scope="module")
def adapted(layer):
    """The same with adapters of rank 5 on gate and down."""
    spec = thinker_spec(small_config(num_experts=6))
    targets = ["*.experts.*.gate_proj", "*.experts.*.down_proj"]
    rng = np.random.default_rng(4)
    adapters = {
        key: jnp.asarray(0.1 * rng.normal(size=weight.shape[1:]), jnp.float32)
        for key, weight in lora_table(thinker_table(spec), rank=5, targets=targets).items()
    }
    return layer | scope(adapters, "model.layers.*.")


def run_experts(layer, x, place):
    return experts.experts_mlp(SPEC, layer, x, route(SPEC, layer, x, wide=place.cuts_width), place)


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


@pytest.mark.parametrize("tokens", [1, 5, 70, 200, 600])
def test_each_token_gets_the_weighted_sum_of_its_top_experts(layer, tokens):
    x = np.random.default_rng(tokens).normal(size=(tokens, SPEC.width)).astype(np.float32)
    np.testing.assert_allclose(run_experts(layer, jnp.asarray(x), ANYWHERE), every_expert_by_hand(layer, x), atol=1e-5)


@pytest.mark.parametrize("sizes", [[96, 0, 0, 0], [1, 40, 0, 33], [16, 16, 16, 16], [0, 0, 0, 0]])
def test_every_platforms_grouping_gives_the_same_values_and_gradients(sizes):
    """The TPU kernel runs interpreted; rows beyond the experts' hold what must not be looked at."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(96, 128)).astype(np.float32)
    rows[sum(sizes) :] = np.nan
    matrices = {f"{name}.weight": rng.normal(size=(4, 128, 128)).astype(np.float32) / 11 for name in NAMES}
    for name in ("up_proj", "down_proj"):
        matrices[f"{name}.lora_A.weight"] = rng.normal(size=(4, 3, 128)).astype(np.float32) / 11
        matrices[f"{name}.lora_B.weight"] = rng.normal(size=(4, 128, 3)).astype(np.float32) / 2
    matrices = jax.tree.map(jnp.asarray, matrices)

    def run(grouping):
        def total(rows, matrices):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(grouped, "_grouping", lambda _platform, _rows, sizes: grouping(sizes))
                y = grouped.grouped_mlp(rows, jnp.asarray(sizes), matrices, platform="cpu")
            return (y * jnp.cos(y)).sum(), y

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(rows, matrices)

    groupings = [
        partial(grouped.blocked, 96),
        grouped.ragged,
        partial(grouped.pallas, 96, interpret=True),
    ]
    merged = merge_adapters(matrices, 1.0)
    assert merged.keys() == {f"{name}.weight" for name in NAMES}
    by_hand = np.zeros((96, 128), np.float32)
    for e, (first, last) in enumerate(itertools.pairwise(np.cumsum([0, *sizes]))):
        gate, up, down = (np.asarray(merged[f"{name}.weight"][e]) for name in NAMES)
        x = rows[first:last]
        by_hand[first:last] = (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T
    results = [run(grouping) for grouping in groupings]
    for gradients, y in results:
        np.testing.assert_allclose(y, by_hand, atol=2e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradients, results[0][0])


@pytest.mark.parametrize("sizes", [[96, 0, 0], [1, 40, 33], [0, 0, 0]])
@pytest.mark.parametrize("layer_number", [0, 1, 4])
def test_matrices_are_found_among_those_of_all_layers(sizes, layer_number):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(96, 128)), jnp.float32)
    layers = {f"{name}.weight": jnp.asarray(rng.normal(size=(5, 3, 128, 128)) / 11, jnp.float32) for name in NAMES}
    of_layer = {key: grouped.OfLayer(value, jnp.int32(layer_number)) for key, value in layers.items()}
    own = {key: value[layer_number] for key, value in layers.items()}
    counts = jnp.asarray(sizes, jnp.int32)

    def result(grouping, matrices, monkeypatch):
        monkeypatch.setattr(grouped, "_grouping", lambda *_: grouping)
        return grouped.grouped_mlp(rows, counts, matrices, platform="cpu")

    with pytest.MonkeyPatch.context() as patch:
        expected = result(grouped.blocked(96, counts), own, patch)
        for grouping in (
            grouped.blocked(96, counts),
            grouped.ragged(counts),
            grouped.pallas(96, counts, interpret=True),
        ):
            np.testing.assert_allclose(result(grouping, of_layer, patch), expected, atol=1e-4)


def test_adapters_of_experts_at_work_equal_merged_ones(layer, adapted):
    x = np.random.default_rng(2).normal(size=(40, SPEC.width)).astype(np.float32)
    at_work = run_experts(adapted, jnp.asarray(x), ANYWHERE)
    merged = merge_adapters(adapted, 1.0)
    assert merged.keys() == layer.keys()
    np.testing.assert_allclose(at_work, every_expert_by_hand(merged, x), atol=1e-5)
    assert np.abs(at_work - every_expert_by_hand(layer, x)).max() > 0.01


@pytest.mark.parametrize("rules", [MANY_TOKENS, FEW_TOKENS], ids=["many", "few"])
@pytest.mark.parametrize("sizes", [{"expert": 2, "fsdp": 2}, {"expert": 2, "tensor": 2}, {"data": 2, "expert": 2}])
@pytest.mark.parametrize("tokens", [8, 64])
@pytest.mark.parametrize(("rows_at_once", "every"), [(16, False), (1 << 15, False), (1 << 15, True)])
def test_experts_on_several_devices_give_what_one_gives(
    adapted, rules, sizes, tokens, rows_at_once, every, monkeypatch
):
    monkeypatch.setattr(experts, "_ROWS_AT_ONCE", rows_at_once)
    monkeypatch.setattr(experts, "every_is_cheaper", lambda *_: every)
    keys = {f"ici_{axis}_parallelism": sizes.get(axis, 1) for axis in ("data", "fsdp", "expert", "tensor")}
    mesh = create_mesh(small_config(**keys))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(tokens, SPEC.width)), jnp.float32)

    def run(place):
        def total(x, layer):
            y = run_experts(layer, x, place)
            return (y * jnp.cos(y)).sum(), y

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(x, adapted)

    alone, shared = run(ANYWHERE), run(Placement(mesh, rules))
    (_, gradients), _ = alone
    assert all(np.abs(value).max() > 1e-3 for key, value in gradients.items() if ".experts." in key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), alone, shared)


def test_every_expert_at_once_gives_what_blocks_of_rows_give(adapted, monkeypatch):
    x = jnp.asarray(np.random.default_rng(5).normal(size=(30, SPEC.width)), jnp.float32)

    def run(every):
        def total(x, layer):
            y = run_experts(layer, x, ANYWHERE)
            return (y * jnp.cos(y)).sum(), y

        monkeypatch.setattr(experts, "every_is_cheaper", lambda *_: every)
        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(x, adapted)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), run(True), run(False))


def test_blocks_pay_once_their_rows_share_copies_of_few_of_many_experts():
    """Eight experts, two for each token, are all at work soon; of 128 experts a few tokens need few."""
    assert [grouped.every_is_cheaper(n, 2, 8) for n in (1, 8, 64, 1000)] == [False, True, True, False]
    assert [grouped.every_is_cheaper(n, 8, 128) for n in (1, 8, 64, 1000)] == [False, False, True, False]


def test_experts_come_to_the_tokens_once_that_moves_less():
    """Two devices: 2 · n · D come and return, against half of three matrices of F · D for each of six experts."""
    assert 3 * 6 * 24 / 2 / 2 == 108
    assert [experts.tokens_travel(SPEC, n, 2) for n in (1, 107, 108, 1000)] == [True, True, False, False]
