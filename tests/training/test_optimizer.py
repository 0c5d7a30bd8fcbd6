import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from pydantic import ValidationError

from audio_grpo.config import Config
from audio_grpo.grpo import init_train_state
from audio_grpo.training.checkpoints import Checkpoints
from audio_grpo.training.optimizer import create_optimizer, learning_rate_schedule

GRADIENTS = [np.asarray([3.0, 4.0]), np.asarray([-0.3, 0.4]), np.asarray([0.1, -0.2])]


def rates(**changes):
    config = Config.model_validate({"steps": 10, "learning_rate": 1.0, "warmup_steps_fraction": 0.3} | changes)
    return [float(learning_rate_schedule(config)(step)) for step in range(config.steps)]


def steps_of(config):
    """Weights after each update from (1, −2)."""
    optimizer = create_optimizer(config)
    weights = {"w": jnp.asarray([1.0, -2.0])}
    state, seen = optimizer.init(weights), []
    for gradient in GRADIENTS:
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, weights)
        weights = optax.apply_updates(weights, updates)
        seen.append(np.asarray(weights["w"]))
    return seen


def adamw(rate, b1, b2, eps, decay, clip):
    """Algorithm 2 of arXiv 1711.05101, with decay scaled by the rate."""
    w, m, v, seen = np.asarray([1.0, -2.0]), np.zeros(2), np.zeros(2), []
    for t, gradient in enumerate(GRADIENTS, start=1):
        g = gradient / max(1.0, np.linalg.norm(gradient) / clip) if clip else gradient
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w = w - rate * ((m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * w)
        seen.append(w)
    return seen


def test_the_rate_rises_over_the_warm_up_and_is_above_zero_at_once():
    np.testing.assert_allclose(rates(), [0.25, 0.5, 0.75] + 7 * [1.0], rtol=1e-6)


def test_without_a_warm_up_the_first_rate_is_the_full_one():
    np.testing.assert_allclose(rates(warmup_steps_fraction=0.0), 10 * [1.0])


def test_the_updates_of_one_step_share_its_rate():
    """Where the gradient is constant, Adam moves by the rate: warm-up in the first of two steps, then the full rate."""
    config = Config(steps=2, learning_rate=1.0, warmup_steps_fraction=0.5, gradient_clipping_threshold=0.0)
    optimizer = create_optimizer(config, updates_per_step=3)
    weights, moved = jnp.zeros(1), []
    state = optimizer.init(weights)
    for _ in range(6):
        change, state = optimizer.update(jnp.ones(1), state, weights)
        moved.append(-float(change[0]))
    np.testing.assert_allclose(moved, 3 * [0.5] + 3 * [1.0], rtol=1e-5)


def test_the_linear_schedule_falls_evenly_after_the_warm_up():
    expected = [0.25, 0.5, 0.75] + [1 - 0.8 * n / 7 for n in range(7)]
    np.testing.assert_allclose(
        rates(learning_rate_schedule="linear", cosine_learning_rate_final_fraction=0.2), expected, rtol=1e-6
    )


def test_the_cosine_schedule_falls_along_a_half_wave_after_the_warm_up():
    expected = [0.25, 0.5, 0.75] + [0.2 + 0.8 * (1 + np.cos(np.pi * n / 7)) / 2 for n in range(7)]
    np.testing.assert_allclose(
        rates(learning_rate_schedule="cosine", cosine_learning_rate_final_fraction=0.2), expected, rtol=1e-6
    )


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_are_those_of_adamw_on_clipped_gradients(clip, decay):
    config = Config(
        learning_rate=0.01,
        warmup_steps_fraction=0.0,
        adam_b1=0.8,
        adam_b2=0.95,
        adam_eps=1e-6,
        adam_weight_decay=decay,
        gradient_clipping_threshold=clip,
    )
    expected = adamw(0.01, 0.8, 0.95, 1e-6, decay, clip)
    np.testing.assert_allclose(steps_of(config), expected, rtol=1e-5)


NARROW = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}


def plain_adam(**changes):
    keys = {"learning_rate": 1e-2, "warmup_steps_fraction": 0.0, "gradient_clipping_threshold": 0.0}
    return create_optimizer(Config.model_validate(keys | changes))


def moments_of(state):
    (adam,) = (x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(x, "nu"))
    return adam


def followed(optimizer, gradients):
    """What each of many gradients changes."""
    step = jax.jit(lambda gradient, state: optimizer.update(gradient, state, jnp.zeros_like(gradient)))
    state, changes = optimizer.init(jnp.zeros_like(gradients[0])), []
    for gradient in gradients:
        change, state = step(gradient, state)
        changes.append(np.asarray(change))
    return np.stack(changes), state


@pytest.mark.parametrize(
    ("given", "formats"),
    [
        ({}, ("float32", "float32")),
        ({"mu_dtype": "bfloat16"}, ("bfloat16", "float32")),
        ({"nu_dtype": "bfloat16"}, ("float32", "bfloat16")),
        (NARROW, ("bfloat16", "bfloat16")),
    ],
)
def test_each_moment_is_kept_in_its_own_format_from_the_first_state_on(given, formats):
    optimizer = plain_adam(**given)
    before = moments_of(optimizer.init(jnp.zeros(3)))
    changes, state = followed(optimizer, jnp.ones((2, 3)))
    for moments in (before, moments_of(state)):
        assert (moments.mu.dtype, moments.nu.dtype) == formats
    assert changes.dtype == np.float32


def test_narrow_moments_take_nearly_the_steps_of_wide_ones():
    """Relative to the largest step, on gradients whose size differs a thousandfold between weights."""
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.normal(size=(300, 64)) * np.logspace(-2, 1, 64), jnp.float32)
    wide, narrow = (followed(plain_adam(**keys), gradients)[0] for keys in ({}, NARROW))
    assert 0 < np.abs(wide - narrow).max() < 0.02 * np.abs(wide).max()
    np.testing.assert_allclose(narrow.sum(axis=0), wide.sum(axis=0), atol=0.05 * np.abs(wide.sum(axis=0)).max())


@pytest.mark.parametrize("before", [100.0, 0.01])
def test_the_second_moment_in_bfloat16_follows_gradients_down_and_up(before):
    """Constant gradients, the worst case: rounding holds it still once it moves by less than 1/256 of itself."""
    gradients = jnp.concatenate([jnp.full((50, 1), before), jnp.ones((2000, 1))])
    _, state = followed(plain_adam(adam_b2=0.99, **NARROW), gradients)
    nu = float(moments_of(state).nu[0])
    assert 1 / 1.65 < nu < 1.65
    _, state = followed(plain_adam(adam_b2=0.9, **NARROW), gradients)
    assert float(moments_of(state).nu[0]) == pytest.approx(1, rel=0.05)


def test_narrow_moments_solve_a_noisy_problem_as_well_as_wide_ones():
    """Least squares whose inputs differ a thousandfold in size, and whose gradients end a million times smaller."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(512, 16)) * np.logspace(-1.5, 1.5, 16)
    targets = inputs @ rng.normal(size=16)

    def error(config):
        optimizer = create_optimizer(config)

        def update(carry, batch):
            weights, state = carry
            x, y = batch
            gradient = jax.grad(lambda w: jnp.mean((x @ w - y) ** 2))(weights)
            changes, state = optimizer.update(gradient, state, weights)
            return (optax.apply_updates(weights, changes), state), None

        order = np.random.default_rng(2).integers(0, len(inputs), (4000, 8))
        start = (jnp.zeros(16), optimizer.init(jnp.zeros(16)))
        batches = (jnp.asarray(inputs[order], jnp.float32), jnp.asarray(targets[order], jnp.float32))
        (weights, _), _ = jax.jit(lambda start: jax.lax.scan(update, start, batches))(start)
        return float(np.mean((inputs @ np.asarray(weights) - targets) ** 2))

    keys = {
        "learning_rate": 1e-2,
        "steps": 4000,
        "learning_rate_schedule": "linear",
        "cosine_learning_rate_final_fraction": 0.0,
    }
    wide, narrow = (error(Config.model_validate(keys | formats)) for formats in ({}, NARROW))
    assert wide < 1e-6 * np.mean(targets**2)
    assert narrow < 1e-6 * np.mean(targets**2)


@pytest.mark.parametrize(("moment", "decay"), [("mu", "adam_b1"), ("nu", "adam_b2")])
def test_averages_that_bfloat16_would_hold_still_are_refused(moment, decay):
    Config.model_validate({f"{moment}_dtype": "bfloat16", decay: 0.996})
    Config.model_validate({decay: 0.999})
    with pytest.raises(ValidationError, match=f"{moment}_dtype bfloat16 .* set {decay} to 0.996 or less"):
        Config.model_validate({f"{moment}_dtype": "bfloat16", decay: 0.997})


@pytest.mark.parametrize(("decay", "falls"), [(0.996, True), (0.9965, False)])
def test_the_bound_on_averages_in_bfloat16_is_where_they_stop_falling(decay, falls):
    values = jnp.linspace(1, 2, 129)[:-1].astype(jnp.bfloat16)
    after = (decay * values.astype(jnp.float32)).astype(jnp.bfloat16)
    assert bool((after < values).all()) == falls


def test_narrow_moments_come_back_from_a_checkpoint_as_they_were(tmp_path):
    optimizer = plain_adam(**NARROW)
    state = init_train_state({"w": jnp.asarray([1.0, 2.0])}, optimizer)
    _, moments = optimizer.update({"w": jnp.asarray([0.3, 7.0])}, state.optimizer, state.trainable)
    state = state._replace(optimizer=moments)
    with Checkpoints(epath.Path(tmp_path), Config(async_checkpointing=False)) as checkpoints:
        checkpoints.save(1, state, json.dumps({}).encode())
        restored = checkpoints.restore(init_train_state({"w": jnp.zeros(2)}, optimizer)).state
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))
