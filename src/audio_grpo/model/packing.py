"""Windows of clips packed into rows, so that the audio tower computes what there is to hear and no padding."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

_ROWS = 8
"""Rows aimed at: fewer would leave more of the last one empty, more would make them short."""
_MOST_WINDOWS = 8
"""In a row: attention within it grows with its square."""


class Packing(NamedTuple):
    """Where the chunks of b clips of n chunks lie in rows; a window's chunks lie side by side."""

    chunk: Int[Array, "rows R"]
    """Index of the chunk at each place, clip by clip; −1 where there is none."""
    place: Int[Array, "b*n"]
    """Place of each chunk, row by row; any place for chunks beyond a clip's end."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Number of rows that are enough for whatever there may be to hear, and chunks in each."""

    count: int
    chunks: int

    @classmethod
    def for_clips(cls, clips: int, chunks: int, window: int) -> "Rows":
        """For clips of at most so many chunks, in windows of at most `window` chunks."""
        longest, windows = min(chunks, window), clips * -(-chunks // window)
        length = longest * min(windows, _MOST_WINDOWS, max(2, windows // _ROWS))
        # Where a window begins a new row, all others hold more than `length - longest`.
        return cls(min(windows, -(-clips * chunks // (length - longest + 1))), length)


def pack_windows(lengths: Int[Array, "b"], chunks: int, window: int, rows: Rows) -> Packing:
    """Pack clips of `lengths` chunks, `chunks` at most, longest window first, each into the first row with room."""
    starts = jnp.arange(-(-chunks // window)) * window
    sizes = jnp.clip(lengths[:, None] - starts, 0, window).reshape(-1)
    order = jnp.argsort(-sizes)

    def put(room: Int[Array, "rows"], size: Int[Array, ""]) -> tuple[Int[Array, "rows"], Int[Array, ""]]:
        row = jnp.argmax(room >= size)
        return room.at[row].add(-size), (row + 1) * rows.chunks - room[row]

    _, placed = jax.lax.scan(put, jnp.full(rows.count, rows.chunks, jnp.int32), sizes[order])
    begins = jnp.zeros_like(sizes).at[order].set(placed).reshape(len(lengths), -1)
    number = jnp.arange(chunks)
    place = begins[:, number // window] + number % window
    real = number < lengths[:, None]
    size = rows.count * rows.chunks
    chunk = jnp.full(size, -1).at[jnp.where(real, place, size).reshape(-1)].set(jnp.arange(place.size), mode="drop")
    return Packing(chunk.reshape(rows.count, rows.chunks), jnp.where(real, place, 0).reshape(-1))
