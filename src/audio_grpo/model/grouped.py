"""Experts' MLPs: grouped products of rows sorted by expert, by the means of each platform, or all experts' of all rows.

A grouping is made once from the rows' sizes and gives three functions: rows into its arrangement, a product of
arranged rows with one matrix per expert, and arranged rows back.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox
from jaxtyping import Array, Float, Int

_FEWEST_ROWS, _MOST_ROWS = 8, 128
"""Of a block, which has a copy of its expert's matrices: more rows share a copy, fewer leave less padding."""
_ROWS_OF_COPY = 128
"""Rows whose product with a matrix takes about as long as a copy of it, on CPU."""
_LANES = 128
"""The TPU kernel takes widths that are multiples of this."""


class OfLayer(NamedTuple):
    """The matrices of one layer, not yet taken out of those of all: a kernel may read them where they lie."""

    layers: Float[Array, "L E O I"]
    layer: Int[Array, ""]


Matrix = Float[Array, "E O I"] | OfLayer
Matrices = Mapping[str, Matrix]
"""`gate_proj.weight`, `up_proj.weight` and `down_proj.weight` of E experts, and the adapters of any of them as
`X.lora_A.weight` [E, rank, I] and `X.lora_B.weight` [E, O, rank]."""


def experts_of(matrices: Matrices) -> int:
    """Number of experts that the matrices belong to."""
    gate = matrices["gate_proj.weight"]
    return (gate.layers[0] if isinstance(gate, OfLayer) else gate).shape[0]


Product = Callable[[Float[Array, "..."], Matrix], Float[Array, "..."]]
"""Of tokens, in whatever arrangement, with their experts' matrices."""


class Grouping(NamedTuple):
    """Products of rows with their experts' matrices; `sizes` says how many rows, in order, each expert has."""

    arrange: Callable[[Float[Array, "n D"]], Float[Array, "..."]]
    product: Product
    restore: Callable[[Float[Array, "..."]], Float[Array, "n D"]]


def grouped_mlp(
    rows: Float[Array, "n D"],
    sizes: Int[Array, "E"],
    matrices: Matrices,
    *,
    platform: str,
    width_axis: str | None = None,
) -> Float[Array, "n D"]:
    """down(silu(gate x) · up x) of each row by its expert; rows beyond the experts' give zeros.

    With `width_axis`, rows and matrices hold this device's part of the width D, and the inner products are completed
    over that mesh axis.
    """
    grouping = _grouping(platform, rows, sizes)
    # Rows that belong to no expert are computed by no kernel and may hold anything, in both directions.
    valid = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]
    y = grouping.restore(_mlp(grouping.product, matrices, grouping.arrange(jnp.where(valid, rows, 0)), width_axis))
    return jnp.where(valid, y, 0)


def every_mlp(
    x: Float[Array, "n D"], shares: Float[Array, "n E"], matrices: Matrices, *, width_axis: str | None = None
) -> Float[Array, "n D"]:
    """Each row's sum of all experts' MLPs by its shares, most of which are 0; `width_axis` as in `grouped_mlp`.

    An expert whose result is not finite spoils rows that it has no share of, too.
    """

    def product(x: Float[Array, "*E I n"], matrix: Matrix) -> Float[Array, "E O n"]:
        # The matrix comes first: XLA's CPU code rearranges the second factor.
        return jnp.einsum("eoi,in->eon" if x.ndim == 2 else "eoi,ein->eon", taken(matrix), x)

    return jnp.einsum("edn,ne->nd", _mlp(product, matrices, x.T, width_axis), shares)


def _mlp(product: Product, matrices: Matrices, x: Float[Array, "..."], width_axis: str | None) -> Float[Array, "..."]:
    """down(silu(gate x) · up x) of rows in a product's arrangement."""

    def inner(name: str) -> Float[Array, "..."]:
        y = _adapted(product, matrices, name, x)
        return y if width_axis is None else jax.lax.psum(y.astype(jnp.float32), width_axis).astype(y.dtype)

    gated = jax.nn.silu(inner("gate_proj")) * inner("up_proj")
    return _adapted(product, matrices, "down_proj", gated)


def _adapted(product: Product, matrices: Matrices, name: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """What `layers.linear` is for one matrix: the product, plus the adapter's part where there is one."""
    y = product(x, matrices[f"{name}.weight"])
    if f"{name}.lora_A.weight" not in matrices:
        return y
    inner = product(x, matrices[f"{name}.lora_A.weight"])
    return y + product(inner, matrices[f"{name}.lora_B.weight"])


def _grouping(platform: str, rows: Float[Array, "n D"], sizes: Int[Array, "E"]) -> Grouping:
    if platform == "cpu":
        return blocked(rows.shape[0], sizes)
    return pallas(rows.shape[0], sizes) if platform == "tpu" else ragged(sizes)


def ragged(sizes: Int[Array, "E"]) -> Grouping:
    """`ragged_dot`, which GPU has and TPU too, though there it copies matrices that are stored as [outputs, inputs]."""
    dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])

    def product(x: Float[Array, "n I"], matrix: Matrix) -> Float[Array, "n O"]:
        return jax.lax.ragged_dot_general(x, taken(matrix), sizes, dims)

    return Grouping(lambda x: x, product, lambda x: x)


def pallas(count: int, sizes: Int[Array, "E"], *, interpret: bool = False) -> Grouping:
    """JAX's megablox kernel for TPU, which reads matrices as they are stored.

    It takes whole lanes only: narrow matrices, such as adapters', are left to `ragged_dot`.
    """
    tile = 512 if count >= 16 * _LANES else _LANES
    padding = -count % tile
    # The last group has no matrix: the kernel leaves out its rows.
    with_rest = jnp.append(sizes, count + padding - sizes.sum()).astype(jnp.int32)

    def product(x: Float[Array, "n I"], matrix: Matrix) -> Float[Array, "n O"]:
        outputs, inputs = (matrix.layers if isinstance(matrix, OfLayer) else matrix).shape[-2:]
        if inputs % _LANES or outputs % _LANES:
            return ragged(sizes).product(x, matrix)
        call = partial(megablox.gmm, transpose_rhs=True, interpret=interpret)
        tiling = (tile, min(1024, inputs), min(1024, outputs))
        if not isinstance(matrix, OfLayer):
            return call(x, matrix, with_rest, x.dtype, tiling)
        # The layer's first matrix has group number 0, so that of the first layer has a negative one. Rows of no group
        # are left as they are, whatever was there.
        first = -matrix.layer * sizes.shape[0]
        return call(x, matrix.layers.reshape(-1, outputs, inputs), sizes, x.dtype, tiling, first)

    return Grouping(lambda x: jnp.pad(x, ((0, padding), (0, 0))), product, lambda x: x[:count])


def taken(matrix: Matrix) -> Float[Array, "E O I"]:
    """The matrices as an array of their own."""
    if not isinstance(matrix, OfLayer):
        return matrix
    return jax.lax.dynamic_index_in_dim(matrix.layers, matrix.layer, keepdims=False)


def blocked(count: int, sizes: Int[Array, "E"]) -> Grouping:
    """Each expert's rows padded to whole blocks, as one batched product over blocks.

    CPU computes a `ragged_dot` for every row and every expert; here the work follows the routed rows.
    """
    experts = sizes.shape[0]
    blocks, size = _blocks(count, experts)
    blocks_per_expert = -(-sizes // size)
    first_block = jnp.cumsum(blocks_per_expert) - blocks_per_expert
    expert_of_row = jnp.repeat(jnp.arange(experts), sizes, total_repeat_length=count)
    rank = jnp.arange(count) - (jnp.cumsum(sizes) - sizes)[expert_of_row]
    slot = first_block[expert_of_row] * size + rank
    # Those of no expert stand beyond the blocks, each in a place of its own.
    slot = jnp.where(jnp.arange(count) < sizes.sum(), slot, blocks * size + jnp.arange(count))
    expert_of_block = jnp.repeat(jnp.arange(experts), blocks_per_expert, total_repeat_length=blocks)

    def arrange(x: Float[Array, "n D"]) -> Float[Array, "b r D"]:
        empty = jnp.zeros((blocks * size, x.shape[1]), x.dtype)
        return empty.at[slot].set(x, mode="drop", unique_indices=True).reshape(blocks, size, -1)

    def product(x: Float[Array, "b r I"], matrix: Matrix) -> Float[Array, "b r O"]:
        if not isinstance(matrix, OfLayer):
            return jnp.einsum("bri,boi->bro", x, matrix[expert_of_block])
        layers = matrix.layers.reshape(-1, *matrix.layers.shape[2:])
        return jnp.einsum("bri,boi->bro", x, layers[matrix.layer * experts + expert_of_block])

    def restore(x: Float[Array, "b r D"]) -> Float[Array, "n D"]:
        return x.reshape(blocks * size, -1).at[slot].get(mode="fill", fill_value=0, unique_indices=True)

    return Grouping(arrange, product, restore)


def _blocks(count: int, experts: int) -> tuple[int, int]:
    """How many blocks `count` rows take at most, and the rows of each: a power of two, about twice an even share."""
    share = max(1, 2 * count // experts)
    size = min(max(1 << (share.bit_length() - 1), _FEWEST_ROWS), _MOST_ROWS)
    return min(count, count // size + experts), size


def every_is_cheaper(tokens: int, experts_per_token: int, experts: int) -> bool:
    """Whether CPU needs less time for all tokens through every expert than for their rows in blocks.

    Either copies matrices, one set for each expert or one for each block, and computes its rows.
    """
    blocks, size = _blocks(tokens * experts_per_token, experts)
    return experts * (tokens + _ROWS_OF_COPY) < blocks * (size + _ROWS_OF_COPY)
