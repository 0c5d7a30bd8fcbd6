"""A complete published-layout checkpoint from weights that never were in one."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from audio_grpo.config import DecoderBlock
from audio_grpo.model.checkpoint.config_json import published_config
from audio_grpo.model.checkpoint.folder import EMBEDDING, HEAD, INDEX
from audio_grpo.model.checkpoint.tensor_file import header_bytes
from audio_grpo.model.checkpoint.vision import VisionSpec, smallest_vision, vision_table
from audio_grpo.model.checkpoint.writing import HostWeights, appearing_folder, as_bytes
from audio_grpo.model.spec import ThinkerSpec
from audio_grpo.model.table import Table, Weights, initialize, published_names
from audio_grpo.model.thinker import thinker_table
from audio_grpo.types import SpecialTokens

SHARD_BYTES = 5_000_000_000
"""Size of the largest file, as in the published checkpoints."""


def published_table(spec: ThinkerSpec, vision: VisionSpec | None) -> Table:
    """Everything that a published thinker stores: a tied head too, and a vision tower where the family has one."""
    table = thinker_table(spec)
    head = {} if HEAD in table else {HEAD: table[EMBEDDING]}
    return {**table, **head, **(vision_table(vision) if vision else {})}


def create_published(
    weights: Weights,
    spec: ThinkerSpec,
    out: Path,
    *,
    family: DecoderBlock,
    special: SpecialTokens,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights as a complete checkpoint with published names and config.json, stored in their own dtype.

    Qwen3-Omni gets a vision tower of the smallest size and random weights, because the published software always
    builds one. The folder appears under its name when it is complete.

    Args:
        weights: arrays of all of the model's table keys.
        spec: the model's sizes.
        out: a folder that does not exist yet.
        family: which published model it is a variant of.
        special: ids that prompts are made of.
        shard_bytes: size of the largest file.

    Raises:
        UserError: `out` exists.
    """
    vision = smallest_vision(spec.decoder.width) if family == "qwen3_omni" else None
    dtype = np.dtype(weights[EMBEDDING].dtype)
    unseen = initialize(vision_table(vision), jax.random.key(0), dtype) if vision else {}
    host = HostWeights({HEAD: weights[EMBEDDING], **weights, **unseen})
    shards = list(_shards(published_table(spec, vision), shard_bytes // dtype.itemsize))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    with appearing_folder(out) as folder:
        for name, shard in zip(names, shards, strict=True):
            _write_file(folder / name if folder else None, shard, dtype, host)
        if folder is None:
            return
        config = published_config(spec, family, special, vision, str(dtype))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if len(shards) > 1:
            (folder / INDEX).write_text(json.dumps(_index(names, shards, dtype), indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    """As published."""
    shape: tuple[int, ...]
    key: str
    index: tuple[int, ...]
    """Into the stacked weight."""


def _shards(table: Table, capacity: int) -> Iterator[list[_Tensor]]:
    """The table's tensors, cut into files of at most `capacity` parameters unless a single tensor is larger."""
    shard: list[_Tensor] = []
    room = capacity
    for key, weight in table.items():
        shape = weight.shape[key.count("*") :]
        for name, index in published_names(key, weight):
            if shard and math.prod(shape) > room:
                yield shard
                shard, room = [], capacity
            shard.append(_Tensor(f"thinker.{name}", shape, key, index))
            room -= math.prod(shape)
    yield shard


def _write_file(path: Path | None, shard: Sequence[_Tensor], dtype: np.dtype, host: HostWeights) -> None:
    values = (as_bytes(host.tensor(tensor.key, tensor.index), dtype) for tensor in shard)
    if path is None:
        for _ in values:
            pass
        return
    with path.open("wb") as file:
        file.write(header_bytes(((tensor.name, tensor.shape) for tensor in shard), dtype))
        file.writelines(values)


def _index(names: Sequence[str], shards: Sequence[Sequence[_Tensor]], dtype: np.dtype) -> dict[str, dict]:
    parameters = sum(math.prod(tensor.shape) for shard in shards for tensor in shard)
    return {
        "metadata": {"total_size": parameters * dtype.itemsize},
        "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
