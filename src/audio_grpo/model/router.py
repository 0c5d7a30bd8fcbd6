"""Which experts tokens go to: those that the router scores highest, or those that are given (router replay)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from audio_grpo.model.layers import linear
from audio_grpo.model.spec import DecoderSpec
from audio_grpo.model.table import Weights
from audio_grpo.types import Routes

UNKNOWN = -1
"""In place of given experts: the router chooses."""


class Routing(NamedTuple):
    """Where one layer's tokens go."""

    shares: Float[Array, "tokens k"]
    """Weights of the experts' results."""
    chosen: Int[Array, "tokens k"]
    probabilities: Float[Array, "tokens E"]
    """Of all experts."""


class Load(NamedTuple):
    """What experts are given to do, by layer."""

    assigned: Float[Array, "*L E"]
    """Tokens that went to each."""
    probabilities: Float[Array, "*L E"]
    """Sum over tokens; the gradient reaches the router through it."""
    tokens: Float[Array, "*L"]


def route(
    spec: DecoderSpec,
    w: Weights,
    x: Float[Array, "tokens D"],
    *,
    wide: bool,
    given: Int[Array, "tokens k"] | None = None,
) -> Routing:
    """Each token's top experts, or the given ones where these are known, and what they weigh.

    Weights come from the router as it is now in either case, so that it can learn (R3, arXiv 2510.11370).
    """
    probabilities = jax.nn.softmax(linear(w, "mlp.gate", x, wide=wide).astype(jnp.float32), axis=-1)
    shares, chosen = jax.lax.top_k(probabilities, spec.experts_per_token)
    if given is not None:
        chosen = jnp.where(given != UNKNOWN, given.astype(chosen.dtype), chosen)
        shares = jnp.take_along_axis(probabilities, chosen, axis=-1)
    if spec.norm_topk:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    return Routing(shares, chosen, probabilities)


def route_dtype(spec: DecoderSpec) -> np.dtype:
    """The narrowest that holds every expert's number and `UNKNOWN`."""
    return np.min_scalar_type(-spec.experts)


def routes_width(spec: DecoderSpec) -> int:
    """Experts that one token meets in all layers."""
    return spec.layers * spec.experts_per_token


def by_position(chosen: Int[Array, "L S Q k"]) -> Int[Array, "S Q Lk"]:
    """Every position's experts, those of the first layer first: k alone would be padded to a whole tile of TPU's."""
    return jnp.moveaxis(chosen, 0, 2).reshape(*chosen.shape[1:3], -1)


def of_layer(
    spec: DecoderSpec, routes: Int[Array, "S Q Lk"] | None, layer: Int[Array, ""] | None
) -> Int[Array, "S Q k"] | None:
    """One layer's part of what `by_position` gives."""
    if routes is None or layer is None:
        return None
    count = spec.experts_per_token
    return jax.lax.dynamic_slice_in_dim(routes, layer * count, count, axis=2)


def given_experts(
    routes: Routes | None, generations: int, length: int
) -> tuple[Int[Array, "B T Lk"] | None, Int[Array, "BG C Lk"] | None]:
    """Routes of prompts, and of the first `length` tokens of each of their G completions, unknown where not sampled."""
    if routes is None:
        return None, None
    tokens = routes.completions[:, :, :length]
    missing = generations - tokens.shape[1]
    tokens = jnp.pad(tokens, ((0, 0), (0, missing), (0, 0), (0, 0)), constant_values=UNKNOWN)
    return routes.prompts, tokens.reshape(-1, *tokens.shape[2:])


def load_of(routing: Routing, counted: Bool[Array, "tokens"]) -> Load:
    """What one layer's experts are given to do by the tokens that count."""
    experts = routing.probabilities.shape[1]
    counted_only = jnp.where(counted[:, None], routing.chosen, experts)
    assigned = jnp.zeros(experts).at[counted_only.reshape(-1)].add(1.0, mode="drop")
    probabilities = jnp.where(counted[:, None], routing.probabilities, 0).sum(axis=0)
    return Load(assigned, probabilities, counted.sum().astype(jnp.float32))
