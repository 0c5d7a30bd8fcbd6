"""Rows of one batch in the places of another's, whatever a column is."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Int


def picked(first: Any, second: Any, source: Int[np.ndarray, "B"]) -> Any:
    """A column of B entries: entry i is `first`'s number `source[i]`, or, from B on, `second`'s number less B.

    Lists, host arrays and device arrays are columns, the latter of whatever sharding, which they keep. A tuple of
    columns gives one of theirs, and None gives None.
    """
    if first is None:
        return None
    if isinstance(first, tuple):
        return type(first)(*(picked(*columns, source) for columns in zip(first, second, strict=True)))
    if isinstance(first, jax.Array):
        return _picked_on_device(first, second, source, sharding=first.sharding)
    if isinstance(first, np.ndarray):
        return np.concatenate([first, second])[source]
    entries = [*first, *second]
    return [entries[i] for i in source]


def picked_batch(first: Mapping[str, Any], second: Mapping[str, Any], source: Int[np.ndarray, "B"]) -> dict[str, Any]:
    """`picked` of every column."""
    return {name: picked(column, second[name], source) for name, column in first.items()}


@partial(jax.jit, static_argnames="sharding")
def _picked_on_device(first: Array, second: Array, source: Int[Array, "B"], *, sharding: Sharding) -> Array:
    count = first.shape[0]
    is_first = (source < count).reshape(-1, *[1] * (first.ndim - 1))
    rows = jnp.where(is_first, first[source % count], second[source % count])
    return jax.lax.with_sharding_constraint(rows, sharding)
