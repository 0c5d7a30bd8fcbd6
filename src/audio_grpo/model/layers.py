"""The few operations that both towers are made of."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from audio_grpo.model.table import Weights


def linear(weights: Weights, name: str, x: Float[Array, "*N D"], *, wide: bool = False) -> Float[Array, "*N O"]:
    """`x` times the transposed `{name}.weight` [O, D], plus `{name}.bias` and the adapter's part where there are.

    `wide` products leave their device in float32: where D is cut over devices, rounded parts of a sum would add up.
    """
    y = _product(x, weights[f"{name}.weight"], wide)
    if f"{name}.lora_A.weight" in weights:
        y = y + _product(_product(x, weights[f"{name}.lora_A.weight"], wide), weights[f"{name}.lora_B.weight"], wide)
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias.astype(x.dtype)


def _product(x: Float[Array, "*N D"], weight: Float[Array, "O D"], wide: bool) -> Float[Array, "*N O"]:
    dtype = jnp.float32 if wide else None
    return jnp.einsum("...d,od->...o", x, weight.astype(x.dtype), preferred_element_type=dtype).astype(x.dtype)


def rms_norm(x: Float[Array, "*N D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*N D"]:
    """Root-mean-square normalisation, statistics in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def layer_norm(weights: Weights, name: str, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Layer normalisation with epsilon 1e-5, statistics in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-5)
    normal = (centred * scale).astype(x.dtype)
    return normal * weights[f"{name}.weight"].astype(x.dtype) + weights[f"{name}.bias"].astype(x.dtype)


def rope(x: Float[Array, "S Q heads N"], positions: Int[Array, "S Q"], theta: float) -> Float[Array, "S Q heads N"]:
    """Rotary position embedding, rotate-half form (arXiv 2104.09864), in float32."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = (positions.astype(jnp.float32)[..., None] * frequencies)[:, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
