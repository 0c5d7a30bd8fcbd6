"""Audio embeddings of clips heard before, within a bound of bytes: in memory, or in a folder that outlives the run."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Shaped


class _Shelf(Protocol):
    """Where arrays lie."""

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Keys and bytes of what is there, that used longest ago first."""
        ...

    def read(self, key: str) -> np.ndarray: ...
    def write(self, key: str, values: np.ndarray) -> None: ...
    def remove(self, key: str) -> None: ...


class _Memory:
    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((key, values.nbytes) for key, values in self._arrays.items())

    def read(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def write(self, key: str, values: np.ndarray) -> None:
        self._arrays[key] = values

    def remove(self, key: str) -> None:
        del self._arrays[key]


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        files = [(file.stat(), file) for file in self._path.glob("*.npy")]
        for stat, file in sorted(files, key=lambda entry: entry[0].st_mtime_ns):
            yield file.stem, stat.st_size

    def read(self, key: str) -> np.ndarray:
        file = self._path / f"{key}.npy"
        file.touch()
        return np.load(file)

    def write(self, key: str, values: np.ndarray) -> None:
        # Under its name only when it is whole: a run may be killed at any time.
        partial = self._path / f"{key}.part"
        with partial.open("wb") as file:
            np.save(file, values)
        partial.rename(self._path / f"{key}.npy")

    def remove(self, key: str) -> None:
        (self._path / f"{key}.npy").unlink()


class ClipStore:
    """Arrays by key; when there are too many bytes, those used longest ago go."""

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        """Keep at most `limit` bytes, in memory or in `folder`, whose arrays of earlier runs are there again."""
        self._limit = limit
        self._shelf: _Shelf = _Memory() if folder is None else _Folder(folder)
        self._sizes = OrderedDict(self._shelf)

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return sum(self._sizes.values())

    def get(self, key: str) -> Shaped[np.ndarray, "A D"] | None:
        """The array kept under a key; numbers that NumPy does not know come as bytes of their width."""
        if key not in self._sizes:
            return None
        self._sizes.move_to_end(key)
        return self._shelf.read(key)

    def put(self, key: str, values: Shaped[np.ndarray, "A D"]) -> None:
        """Keep an array, unless it alone is too large."""
        if key in self._sizes or values.nbytes > self._limit:
            return
        while self.bytes + values.nbytes > self._limit:
            oldest, _ = self._sizes.popitem(last=False)
            self._shelf.remove(oldest)
        self._shelf.write(key, values)
        self._sizes[key] = values.nbytes
