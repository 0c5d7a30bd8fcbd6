"""Safetensors files, memory-mapped: eight bytes of header length, a JSON header, then the tensors' bytes.

The `safetensors` library holds on to every page it has read and writes from memory only. Here a tensor's pages are
given back once it has been read, and files are written as a stream: checkpoints are larger than a host's memory.
"""

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from audio_grpo.errors import UserError

FLOAT_DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Number formats that weights may be stored in."""

_CHUNK = 1 << 24
"""Bytes copied at a time."""


class TensorFile:
    """An open file and where in it each tensor lies.

    Raises:
        UserError: the file is missing, cut short, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can not be read: {error}.") from error
        self.data_start, header = self._read_header()
        self.tensors = sorted(
            (self._locate(name, entry) for name, entry in header.items() if name != "__metadata__"),
            key=lambda tensor: tensor.start,
        )
        self._require_seamless()

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        size = int.from_bytes(self._mapped[:8], "little")
        if size > len(self._mapped) - 8:
            raise self._damaged(f"its header should have {size} bytes, but the file has {len(self._mapped)}")
        try:
            header = json.loads(self._mapped[8 : 8 + size])
        except ValueError as error:
            raise self._damaged("its header is no JSON") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        return 8 + size, header

    def _locate(self, name: str, entry: Any) -> "StoredTensor":
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            elements = math.prod(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"the header's entry for {name} is malformed") from error
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
            raise self._damaged(f"the header's entry for {name} has sizes that are no whole numbers")
        if dtype in FLOAT_DTYPES and stop - start != elements * FLOAT_DTYPES[dtype].itemsize:
            raise self._damaged(f"{name} of shape {list(shape)} in {dtype} does not fill its {stop - start} bytes")
        return StoredTensor(self, name, dtype, shape, self.data_start + start, self.data_start + stop)

    def _require_seamless(self) -> None:
        end = self.data_start
        for tensor in self.tensors:
            if tensor.start != end:
                raise self._damaged(f"{tensor.name} does not begin where the tensor before it ends")
            end = tensor.stop
        if end != len(self._mapped):
            raise self._damaged(f"its header describes {end} bytes, but the file has {len(self._mapped)}")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is damaged: {what}. Copy or download it again.")

    def read(self, start: int, stop: int) -> bytes:
        """A copy of a range of the file."""
        return self._mapped[start:stop]

    def array(self, dtype: np.dtype, count: int, start: int) -> np.ndarray:
        """A read-only view of the file, read when it is touched."""
        return np.frombuffer(self._mapped, dtype, count, start)

    def release(self, start: int, stop: int) -> None:
        """Give the pages of a range that has been read back to the system."""
        first = start - start % mmap.PAGESIZE
        if stop > first:
            self._mapped.madvise(mmap.MADV_DONTNEED, first, stop - first)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file."""

    file: TensorFile
    name: str
    dtype: str
    """Safetensors' name, e.g. "BF16"."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int

    def array(self) -> np.ndarray:
        """The tensor as a read-only view of the file; its dtype must be one of `FLOAT_DTYPES`."""
        return self.file.array(FLOAT_DTYPES[self.dtype], math.prod(self.shape), self.start).reshape(self.shape)

    def release(self) -> None:
        """Give the tensor's pages back to the system."""
        self.file.release(self.start, self.stop)

    def equals(self, other: "StoredTensor") -> bool:
        """Whether both hold the same bytes."""
        if self.stop - self.start != other.stop - other.start:
            return False
        pairs = zip(self.chunks(), other.chunks(), strict=True)
        return all(mine == theirs for mine, theirs in pairs)

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes, a bounded part at a time."""
        for start in range(self.start, self.stop, _CHUNK):
            stop = min(start + _CHUNK, self.stop)
            yield self.file.read(start, stop)
            self.file.release(start, stop)

    def split(self, names: Sequence[str], shape: tuple[int, ...]) -> "list[StoredTensor]":
        """Consecutive tensors of one shape that together are this one."""
        size = (self.stop - self.start) // len(names)
        return [
            replace(self, name=name, shape=shape, start=self.start + i * size, stop=self.start + (i + 1) * size)
            for i, name in enumerate(names)
        ]


def header_bytes(tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: np.dtype) -> bytes:
    """Length and header of a file that holds tensors of one dtype in the given order."""
    stored_dtype = next(name for name, stored in FLOAT_DTYPES.items() if stored == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored_dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
