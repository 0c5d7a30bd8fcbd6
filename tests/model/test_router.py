from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.model import router
from audio_grpo.model.experts import experts_mlp
from audio_grpo.model.router import UNKNOWN, route
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import initialize, scope
from audio_grpo.model.thinker import group_forward, prefill, thinker_table
from audio_grpo.parallel.activations import MANY_TOKENS, Placement
from audio_grpo.parallel.mesh import create_mesh
from audio_grpo.types import PromptBatch, Routes
from small_model import AUDIO_PAD, random_weights, small_config

CONFIG = small_config(num_experts=6)
SPEC = thinker_spec(CONFIG)
ANYWHERE = Placement(None, MANY_TOKENS)
GATE = "mlp.gate.weight"
B, G, C, T = 4, 3, 7, 9
LENGTHS = np.asarray([4, 7, 9, 5], np.int32)


@pytest.fixture(scope="module")
def layer():
    weights = initialize(thinker_table(SPEC), jax.random.key(1), jnp.float32)
    return {key: value[0] for key, value in scope(weights, "model.layers.*.").items()}


@pytest.fixture(scope="module")
def weights():
    return random_weights(CONFIG)


@pytest.fixture(scope="module")
def batch():
    """Prompts of text and their completions, which are of any length up to C."""
    rng = np.random.default_rng(2)
    prompts = PromptBatch(jnp.asarray(rng.integers(6, 200, (B, T)), jnp.int32), jnp.asarray(LENGTHS))
    completions = jnp.asarray(rng.integers(6, 200, (B, G, C)), jnp.int32)
    counted = jnp.arange(C) < rng.integers(1, C + 1, (B, G))[..., None]
    return prompts, jnp.zeros((B, 0, SPEC.decoder.width)), completions, counted


@pytest.fixture(scope="module")
def random_routes():
    return Routes(drawn_routes((B, T), 0), drawn_routes((B, G, C), 1))


def drawn_routes(shape, seed):
    """Two different experts out of six for each token in each of two layers."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((*shape, 2, 6)), axis=-1)[..., :2]
    return order.reshape(*shape, -1).astype(np.int8)


def hidden_of(spec, weights, batch, routes=None):
    prompts, heard, completions, _ = batch
    run = jax.jit(partial(group_forward, spec), static_argnums=4)
    return run(weights, prompts, heard, completions, AUDIO_PAD, routes).hidden


def by_hand(layer, x, chosen, norm_topk):
    probabilities = np.asarray(jax.nn.softmax(x @ layer[GATE].T, axis=-1))
    y = np.zeros_like(x)
    for n, row in enumerate(x):
        shares = probabilities[n][chosen[n]]
        for share, e in zip(shares / shares.sum() if norm_topk else shares, chosen[n], strict=True):
            gate, up, down = (layer[f"mlp.experts.*.{name}_proj.weight"][e] for name in ("gate", "up", "down"))
            y[n] += share * (down @ (jax.nn.silu(gate @ row) * (up @ row)))
    return y


@pytest.mark.parametrize("norm_topk", [True, False])
def test_given_experts_weigh_what_the_router_says_now(layer, norm_topk):
    spec = thinker_spec(small_config(num_experts=6, norm_topk_prob=norm_topk)).decoder
    x = np.random.default_rng(0).normal(size=(20, spec.width)).astype(np.float32)
    chosen = drawn_routes((20,), 3)[:, :2]
    routing = route(spec, layer, jnp.asarray(x), wide=False, given=jnp.asarray(chosen))
    y = experts_mlp(spec, layer, jnp.asarray(x), routing, ANYWHERE)
    np.testing.assert_allclose(y, by_hand(layer, x, chosen, norm_topk), atol=1e-5)
    np.testing.assert_array_equal(routing.chosen, chosen)


def test_the_router_chooses_where_nothing_is_given(layer):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, SPEC.decoder.width)), jnp.float32)
    own = route(SPEC.decoder, layer, x, wide=False)
    other = (own.chosen + 1) % 6
    given = jnp.where(jnp.arange(20)[:, None] < 8, UNKNOWN, other).astype(jnp.int8)
    mixed = route(SPEC.decoder, layer, x, wide=False, given=given)
    np.testing.assert_array_equal(mixed.chosen, np.where(np.arange(20)[:, None] < 8, own.chosen, other))
    np.testing.assert_allclose(mixed.shares[:8], own.shares[:8], atol=1e-7)
    np.testing.assert_allclose(mixed.shares.sum(axis=1), 1, atol=1e-6)


def test_a_router_learns_with_given_experts_too(layer):
    """The gradient is that of a softmax over the given experts' scores."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, SPEC.decoder.width)), jnp.float32)
    given = jnp.asarray(drawn_routes((20,), 3)[:, :2])
    probe = jnp.asarray(np.random.default_rng(1).normal(size=(20, 2)), jnp.float32)

    def shares(gate):
        return route(SPEC.decoder, layer | {GATE: gate}, x, wide=False, given=given).shares

    def masked_softmax(gate):
        return jax.nn.softmax(jnp.take_along_axis(x @ gate.T, given.astype(jnp.int32), axis=1), axis=1)

    ours, theirs = (jax.grad(lambda gate, f=f: (f(gate) * probe).sum())(layer[GATE]) for f in (shares, masked_softmax))
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("experts", "dtype"), [(4, "int8"), (128, "int8"), (129, "int16"), (512, "int16")])
def test_routes_take_the_narrowest_integers_that_hold_them(experts, dtype):
    spec = thinker_spec(small_config(num_experts=experts)).decoder
    assert router.route_dtype(spec) == dtype
    assert np.asarray([experts - 1, UNKNOWN]).astype(dtype).tolist() == [experts - 1, UNKNOWN]


def test_layers_are_found_again_among_a_positions_routes():
    chosen = jnp.asarray(np.random.default_rng(0).integers(0, 6, (2, 3, 5, 2)))
    routes = router.by_position(chosen)
    assert routes.shape == (3, 5, router.routes_width(SPEC.decoder))
    for number in range(2):
        np.testing.assert_array_equal(router.of_layer(SPEC.decoder, routes, jnp.int32(number)), chosen[number])


def own_routes(weights, batch):
    """What the router chooses in a prefill of every prompt with each of its completions."""
    prompts, _, completions, _ = batch
    tokens = np.zeros((B * G, T + C), np.int32)
    for b, g in np.ndindex(B, G):
        tokens[b * G + g, : LENGTHS[b]] = prompts.tokens[b, : LENGTHS[b]]
        tokens[b * G + g, LENGTHS[b] : LENGTHS[b] + C] = completions[b, g]
    lengths = jnp.repeat(prompts.true_length + C, G)
    run = jax.jit(partial(prefill, replace(SPEC, router_replay=True)), static_argnums=3)
    unheard = jnp.zeros((B * G, 0, SPEC.decoder.width))
    _, kept = run(weights, PromptBatch(jnp.asarray(tokens), lengths), unheard, AUDIO_PAD)
    whole = np.asarray(kept.routes).reshape(B, G, T + C, -1)
    answers = np.stack([[whole[b, g, n : n + C] for g in range(G)] for b, n in enumerate(LENGTHS)])
    return Routes(whole[:, 0, :T], answers)


def test_a_groups_own_routes_change_nothing(weights, batch):
    """Prompts end at different places: a route that is off by one position would be another token's."""
    routes = own_routes(weights, batch)
    assert routes.completions.dtype == np.int8
    np.testing.assert_allclose(hidden_of(SPEC, weights, batch, routes), hidden_of(SPEC, weights, batch), atol=1e-5)


def test_other_routes_change_what_depends_on_them_alone(weights, batch, random_routes):
    free = np.asarray(hidden_of(SPEC, weights, batch))
    known = np.full_like(random_routes.completions, UNKNOWN)
    known[1, 2, 3] = random_routes.completions[1, 2, 3]
    routes = Routes(np.full_like(random_routes.prompts, UNKNOWN), known)
    changed = np.abs(np.asarray(hidden_of(SPEC, weights, batch, routes)) - free).max(axis=-1) > 1e-3
    # Token 3 is the input that predicts token 4.
    expected = np.zeros((B, G, C), bool)
    expected[1, 2, 4:] = True
    np.testing.assert_array_equal(changed, expected)


def test_completions_beyond_those_sampled_choose_their_experts_themselves(weights, batch, random_routes):
    fewer = random_routes._replace(completions=random_routes.completions[:, :2])
    unknown = np.concatenate([fewer.completions, np.full((B, 1, C, 4), UNKNOWN, np.int8)], axis=1)
    np.testing.assert_array_equal(
        hidden_of(SPEC, weights, batch, fewer),
        hidden_of(SPEC, weights, batch, random_routes._replace(completions=unknown)),
    )


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"expert": 2, "tensor": 2}, {"data": 2, "expert": 2}])
def test_replayed_groups_on_several_devices_give_values_gradients_and_load_of_one(weights, batch, random_routes, sizes):
    prompts, heard, completions, counted = batch
    keys = {f"ici_{axis}_parallelism": sizes.get(axis, 1) for axis in ("data", "fsdp", "expert", "tensor")}
    mesh = create_mesh(small_config(num_experts=6, **keys))

    def run(spec):
        def total(weights, routes):
            hidden, load = group_forward(spec, weights, prompts, heard, completions, AUDIO_PAD, routes, counted)
            return jnp.sin(hidden).sum() + (load.probabilities**2).sum() / 100, (hidden, load)

        return jax.jit(jax.grad(total, has_aux=True))(weights, random_routes)

    (alone, of_alone), (shared, of_shared) = run(SPEC), run(thinker_spec(CONFIG, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), of_alone, of_shared)
    for key, value in alone.items():
        np.testing.assert_allclose(value, shared[key], atol=1e-4 * max(1, np.abs(value).max()), err_msg=key)
    assert np.abs(alone["model.layers.*.mlp.gate.weight"]).max() > 1e-3


def test_the_load_counts_every_real_token_once_for_each_of_its_experts(weights, batch, random_routes):
    prompts, heard, completions, counted = batch
    run = jax.jit(partial(group_forward, SPEC), static_argnums=4)
    _, load = run(weights, prompts, heard, completions, AUDIO_PAD, random_routes, counted)
    real = [random_routes.prompts[np.arange(T) < LENGTHS[:, None]]]
    real.append(random_routes.completions[:, :, :-1][np.asarray(counted)[:, :, :-1]])
    chosen = np.concatenate(real).reshape(-1, 2, 2)
    for number in range(2):
        expected = np.bincount(chosen[:, number].reshape(-1), minlength=6)
        np.testing.assert_array_equal(load.assigned[number], expected)
    np.testing.assert_array_equal(load.tokens, [len(chosen)] * 2)
    np.testing.assert_allclose(load.probabilities.sum(axis=1), len(chosen), rtol=1e-5)


def test_a_dense_model_has_no_load(batch):
    config = small_config()
    prompts, heard, completions, counted = batch
    forward = group_forward(
        thinker_spec(config), random_weights(config), prompts, heard, completions, AUDIO_PAD, None, counted
    )
    assert forward.load is None
