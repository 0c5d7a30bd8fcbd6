"""Trained weights into the published checkpoint that they came from."""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jaxtyping import Array

from audio_grpo.errors import UserError
from audio_grpo.model.checkpoint.folder import EMBEDDING, HEAD, open_files, table_tensors
from audio_grpo.model.checkpoint.names import single_tensors
from audio_grpo.model.checkpoint.tensor_file import FLOAT_DTYPES, TensorFile
from audio_grpo.model.table import Table, Weights, published_names

_WRITTEN = "checkpoint written"

Origins = Mapping[str, tuple[str, tuple[int, ...]]]
"""Table name of a published tensor to the table key and index of its values."""


def write_published(weights: Weights, table: Table, out: Path, *, source: Path, changed: Collection[str]) -> None:
    """Write a complete checkpoint: the one at `source` with the weights in `changed` replaced.

    Files, their sizes and the index are the source's. Every tensor that does not belong to a changed weight and every
    file that holds no tensors is copied byte for byte; changed weights are cast to the dtype that the source stores.
    The folder appears under its name when it is complete.

    Args:
        weights: arrays by table key, at least those in `changed`.
        table: of the whole model.
        out: a folder that does not exist yet.
        source: folder of the published checkpoint.
        changed: table keys of the weights that training touched.

    Raises:
        UserError: `out` exists, or the source does not hold the table's model.
    """
    files = open_files(source)
    table_tensors(source, files, table)
    origins = weight_origins(table, changed)
    host = HostWeights(weights)
    with appearing_folder(out) as folder:
        for file in files:
            _write_file(file, folder, origins, host)
        if folder is not None:
            _copy_other_files(source, folder)


def weight_origins(table: Table, keys: Collection[str]) -> Origins:
    """Where the values of published tensors come from; a tied head's are the embedding's."""
    origins = {name: (key, index) for key in keys for name, index in published_names(key, table[key])}
    if HEAD not in table and EMBEDDING in origins:
        origins[HEAD] = origins[EMBEDDING]
    return origins


class HostWeights:
    """Device arrays on the host, a layer of a weight at a time.

    With several processes, all of them ask for the same tensors in the same order.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._layers: dict[str, tuple[int, np.ndarray]] = {}
        """The layer fetched last of each stacked weight: a file's tensors are ordered by layer, then by name."""

    def tensor(self, key: str, index: tuple[int, ...]) -> np.ndarray:
        """One published tensor's values."""
        if not index:
            return _fetch(self._weights[key])
        layer, *rest = index
        if self._layers.get(key, (None,))[0] != layer:
            self._layers[key] = (layer, _fetch(self._weights[key], layer))
        return self._layers[key][1][tuple(rest)]


def _fetch(array: Array, layer: int | None = None) -> np.ndarray:
    part = array if layer is None else array[layer]
    return np.asarray(part if part.is_fully_addressable else process_allgather(part, tiled=True))


def as_bytes(values: np.ndarray, dtype: np.dtype) -> memoryview:
    """What a file holds of values cast to `dtype`."""
    return np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8).data


def _write_file(file: TensorFile, folder: Path | None, origins: Origins, host: HostWeights) -> None:
    tensors = [single for tensor in file.tensors for single in single_tensors(tensor)]
    if folder is None:
        for tensor in tensors:
            if tensor.name in origins:
                host.tensor(*origins[tensor.name])
        return
    with (folder / file.path.name).open("wb") as out:
        out.write(file.read(0, file.data_start))
        for tensor in tensors:
            if tensor.name in origins:
                out.write(as_bytes(host.tensor(*origins[tensor.name]), FLOAT_DTYPES[tensor.dtype]))
            else:
                out.writelines(tensor.chunks())


def _copy_other_files(source: Path, folder: Path) -> None:
    for item in source.iterdir():
        if item.name.startswith(".") or item.suffix == ".safetensors":
            continue
        if item.is_dir():
            shutil.copytree(item, folder / item.name)
        else:
            shutil.copyfile(item, folder / item.name)


@contextmanager
def appearing_folder(out: Path) -> Iterator[Path | None]:
    """A temporary folder that gets the name `out` once the block is done; None in all processes but the first.

    Raises:
        UserError: `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: give the name of a folder that does not.")
    if jax.process_index() != 0:
        yield None
        sync_global_devices(_WRITTEN)
        return
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_global_devices(_WRITTEN)  # or a slower process would still look whether `out` exists
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary)
        raise
