"""The weight table: every weight declared once, everything else derived from it.

A table maps keys to `Weight`s. A key is the tensor's published name below `thinker.`, with `*` in place of each index
that we stack over, outermost first: `model.layers.*.mlp.experts.*.up_proj.weight` is one array [L, E, width, D] that
stands for L·E published tensors of shape [width, D]. Weights keep the published orientation: a linear map is
[outputs, inputs]. From the table follow random weights, abstract shapes, shardings, the names in published files,
freezing and sizes; a dictionary of arrays under the same keys is what the model functions take.
"""

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from audio_grpo.parallel.mesh import weight_sharding

Weights = Mapping[str, Array]
"""Arrays by table key."""


@dataclass(frozen=True, slots=True)
class Weight:
    """Declaration of one (stacked) weight."""

    shape: tuple[int, ...]
    """The stacked sizes, one for each `*` of the key, then the published shape."""
    axes: tuple[str | None, ...]
    """Logical axis of each dimension, which sharding rules map to mesh axes; None is never sharded."""
    init: Literal["fan_in", "before_gelu", "embedding", "ones", "zeros"] = "fan_in"
    """Normal with standard deviation inputs^−0.5 ("fan_in"), twice that ("before_gelu", which halves small values) or
    0.02 ("embedding"); or a constant."""
    unit: int = 1
    """Consecutive rows of a dimension over heads that stay together: the head width."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


Table = Mapping[str, Weight]


def published_names(key: str, weight: Weight) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names below `thinker.` of the published tensors that `key` stacks, each with its index into the stacked array."""
    stacked = weight.shape[: key.count("*")]
    for index in itertools.product(*map(range, stacked)):
        yield key.replace("*", "{}").format(*index), index


def abstract(table: Table, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes without data."""
    return {key: jax.ShapeDtypeStruct(weight.shape, dtype) for key, weight in table.items()}


def sharding_of(mesh: Mesh, key: str, weight: Weight) -> NamedSharding:
    """Where a weight lies on the mesh.

    Raises:
        UserError: the rules do not fit the weight.
    """
    return weight_sharding(mesh, key, weight.shape, weight.axes, unit=weight.unit)


def initialize(table: Table, key: Key[Array, ""], dtype: DTypeLike) -> dict[str, Array]:
    """Random weights; a weight's values depend on `key` and its own name alone."""
    return {name: _draw(name, weight, key).astype(dtype) for name, weight in table.items()}


def _draw(name: str, weight: Weight, key: Key[Array, ""]) -> Array:
    if weight.init == "ones":
        return jnp.ones(weight.shape, jnp.float32)
    if weight.init == "zeros":
        return jnp.zeros(weight.shape, jnp.float32)
    scale = math.prod(weight.shape[name.count("*") + 1 :]) ** -0.5
    deviation = {"fan_in": scale, "before_gelu": 2 * scale, "embedding": 0.02}[weight.init]
    return deviation * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), weight.shape, jnp.float32)


def scope(weights: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The weights below `prefix`, under the rest of their names."""
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


def parameter_count(table: Table) -> int:
    """Parameters of all weights."""
    return sum(weight.size for weight in table.values())
