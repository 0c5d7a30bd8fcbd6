"""64 bits that tell arrays apart, computed where the arrays lie."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

_SEEDS = (0x9E3779B9, 0x7FEB352D)
"""One for each half."""


def fingerprints(rows: Float[Array, "B *rest"], counts: Bool[Array, "B *rest"] | None = None) -> UInt32[Array, "B 2"]:
    """A fingerprint of each row's bits and their places; where `counts` is false, elements leave no trace.

    Sums of integers, so that neither the order of summation nor the mesh matters.
    """
    bits = jax.lax.bitcast_convert_type(rows, jnp.dtype(f"uint{8 * rows.dtype.itemsize}")).astype(jnp.uint32)
    axes = tuple(range(1, rows.ndim))
    places = [jax.lax.broadcasted_iota(jnp.uint32, rows.shape, axis) * np.uint32(_stride(axis)) for axis in axes]
    place = jnp.asarray(sum(places))
    halves = []
    for seed in _SEEDS:
        mixed = _mix(_mix(bits + np.uint32(seed)) ^ (place * np.uint32(seed | 1)))
        kept = mixed if counts is None else jnp.where(counts, mixed, np.uint32(0))
        halves.append(kept.sum(axis=axes, dtype=jnp.uint32))
    return jnp.stack(halves, axis=1)


def _stride(axis: int) -> int:
    """Steps of a dimension, which do not depend on the others' sizes: padding leaves elements their places."""
    return pow(0x01000193, axis, 1 << 32)


def _mix(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """MurmurHash3's finalizer: every bit of the input changes half the bits of the result."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
