import jax.numpy as jnp
import numpy as np
import optax
import pytest

from audio_grpo.config import Config
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
