"""How evenly tokens are shared out over experts: what is told of it, and the loss that evens it out."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from audio_grpo.grpo.metrics import Average, LargestLoad, Metric, UnusedExperts
from audio_grpo.model.router import Load


def with_experts(
    loss: Float[Array, ""], aux: Any, load: Load | None, coefficient: float
) -> tuple[Float[Array, ""], Any]:
    """A part's loss plus `coefficient` times the balance loss, and its report with what experts were given to do.

    The report, of whatever loss, has its `loss` and `metrics`.
    """
    if load is None:
        return loss, aux
    metrics: dict[str, Metric] = aux.metrics | load_metrics(load)
    if coefficient:
        balance = balance_loss(load)
        loss = loss + coefficient * balance
        metrics["aux_loss"] = Average(jax.lax.stop_gradient(balance), jnp.float32(1))
    return loss, aux._replace(loss=jax.lax.stop_gradient(loss), metrics=metrics)


def load_metrics(load: Load) -> dict[str, Metric]:
    """What a part of a batch reports."""
    assigned = jax.lax.stop_gradient(load.assigned)
    return {"router/load_max": LargestLoad(assigned), "router/unused_experts": UnusedExperts(assigned)}


def balance_loss(load: Load) -> Float[Array, ""]:
    """E · Σ_e f_e · P_e over the tokens of all layers together: k where tokens are shared out evenly.

    f is the share of tokens that went to an expert, P its mean probability, through which alone the gradient flows
    (Switch Transformers, arXiv 2101.03961, section 2.2; layers are joined as in transformers' Qwen3-Omni).
    """
    tokens = jnp.maximum(load.tokens.sum(), 1.0)
    shares = jax.lax.stop_gradient(load.assigned.sum(axis=0)) / tokens
    probabilities = load.probabilities.sum(axis=0) / tokens
    return shares.shape[0] * (shares * probabilities).sum()
