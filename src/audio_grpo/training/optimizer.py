"""AdamW with warm-up, decay and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from audio_grpo.config import Config


def learning_rate_schedule(config: Config) -> optax.Schedule:
    """Rate by step, from 0 on: up from 0 over `warmup_steps_fraction` of the steps, then constant, linear or cosine."""
    warmup = round(config.warmup_steps_fraction * config.steps)
    peak, rest = config.learning_rate, max(1, config.steps - warmup)
    final = config.cosine_learning_rate_final_fraction
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * final, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=final),
    }[config.learning_rate_schedule]
    # The first step already has a rate above 0: a rate of 0 would spend a batch on nothing.
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def create_optimizer(config: Config, updates_per_step: int = 1) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) on gradients clipped by their global norm; the updates of one step share its rate."""
    schedule = learning_rate_schedule(config)
    adam = optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps)
    adamw = optax.chain(
        _with_moments_in(adam, jnp.dtype(config.mu_dtype), jnp.dtype(config.nu_dtype)),
        optax.add_decayed_weights(config.adam_weight_decay),
        optax.scale_by_learning_rate(lambda update: schedule(jnp.asarray(update) // updates_per_step)),
    )
    if config.gradient_clipping_threshold == 0:
        return adamw
    return optax.chain(_clipped_to(config.gradient_clipping_threshold), adamw)


def _clipped_to(largest: float) -> optax.GradientTransformation:
    """Gradients scaled so that their global norm is at most `largest`.

    optax's `clip_by_global_norm` gives the same, but divides each gradient where it is used: compilers then keep a
    clipped copy of all gradients, which one factor for all of them spares.
    """

    def init(params: optax.Params) -> optax.OptState:
        del params
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        factor = jnp.minimum(1.0, largest / optax.tree.norm(updates))
        return jax.tree.map(lambda gradient: gradient * factor, updates), state

    return optax.GradientTransformation(init, update)


def _with_moments_in(
    adam: optax.GradientTransformation, mu_dtype: jnp.dtype, nu_dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Adam whose moments are computed in float32 and kept in formats of their own between updates."""

    def cast(state: Any, mu: jnp.dtype, nu: jnp.dtype) -> Any:
        return state._replace(mu=optax.tree.cast(state.mu, mu), nu=optax.tree.cast(state.nu, nu))

    def init(params: optax.Params) -> optax.OptState:
        return cast(adam.init(params), mu_dtype, nu_dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        precise = jnp.dtype(jnp.float32)
        updates, new = adam.update(updates, cast(state, precise, precise), params)
        return updates, cast(new, mu_dtype, nu_dtype)

    return optax.GradientTransformation(init, update)
