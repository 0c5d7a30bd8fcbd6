"""A folder of safetensors files: with an index, without, or one file alone."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from audio_grpo.errors import UserError
from audio_grpo.model.checkpoint.names import is_carried, single_tensors
from audio_grpo.model.checkpoint.tensor_file import FLOAT_DTYPES, StoredTensor, TensorFile
from audio_grpo.model.table import Table, published_names

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LISTED = 8
"""Names of a kind that an error message spells out."""


def open_files(folder: Path) -> list[TensorFile]:
    """Open the files of a checkpoint.

    Raises:
        UserError: there are none, one is missing or damaged, or the index and the files do not agree.
    """
    if (folder / INDEX).exists():
        return _open_indexed(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} holds no safetensors file: give the folder of a published checkpoint.")
    return [TensorFile(path) for path in paths]


def _open_indexed(folder: Path) -> list[TensorFile]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise UserError(f"{folder / INDEX} has no weight_map from tensor names to file names of the same folder.")
    files = [TensorFile(folder / name) for name in sorted(set(weight_map.values()))]
    held = {(tensor.name, file.path.name) for file in files for tensor in file.tensors}
    problems = {
        "named in the index, but not in its file": [
            name for name, file in weight_map.items() if (name, file) not in held
        ],
        "in a file, but not named there by the index": [name for name, file in held if weight_map.get(name) != file],
    }
    refuse(f"{folder / INDEX} does not describe the files beside it", problems)
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can not be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__} where a JSON object is expected.")
    return value


def table_tensors(folder: Path, files: Iterable[TensorFile], table: Table) -> dict[str, StoredTensor]:
    """The stored tensor of every published name of the table, and the head that tied models may store as well.

    Raises:
        UserError: names, shapes or dtypes are not the table's; lists all that are not.
    """
    required = {
        name: weight.shape[key.count("*") :]
        for key, weight in table.items()
        for name, _ in published_names(key, weight)
    }
    shapes = required if HEAD in required else {**required, HEAD: required[EMBEDDING]}
    stored, twice = _by_table_name(files)
    known = {name: tensor for name, tensor in stored.items() if name in shapes}
    problems = {
        "missing": [name for name in required if name not in stored],
        "unexpected": [name for name in stored if name not in shapes],
        "stored twice": twice,
        "of a wrong shape": [
            f"{name} {list(tensor.shape)} instead of {list(shapes[name])}"
            for name, tensor in known.items()
            if tensor.shape != shapes[name]
        ],
        f"of a dtype other than {', '.join(FLOAT_DTYPES)}": [
            f"{name} {tensor.dtype}" for name, tensor in known.items() if tensor.dtype not in FLOAT_DTYPES
        ],
    }
    refuse(f"{folder} does not hold the model that its config.json describes", problems)
    if HEAD not in required and HEAD in stored and not stored[HEAD].equals(stored[EMBEDDING]):
        raise UserError(
            f"{folder} stores an {HEAD} that differs from {EMBEDDING}, although its config.json ties them: set "
            "tie_word_embeddings to false there to use the stored head, or remove the head."
        )
    return known


def _by_table_name(files: Iterable[TensorFile]) -> tuple[dict[str, StoredTensor], list[str]]:
    stored: dict[str, StoredTensor] = {}
    twice = []
    for file in files:
        for tensor in file.tensors:
            for single in single_tensors(tensor):
                if is_carried(single.name):
                    continue
                if single.name in stored:
                    twice.append(f"{single.name} in {stored[single.name].file.path.name} and {file.path.name}")
                stored[single.name] = single
    return stored, twice


def refuse(what: str, problems: Mapping[str, list[str]]) -> None:
    """Raise one UserError that lists all problems by kind, if there are any."""
    kinds = [f"{len(names)} {kind}: {_some(sorted(names))}" for kind, names in problems.items() if names]
    if kinds:
        raise UserError("; ".join([f"{what}: tensors {kinds[0]}", *kinds[1:]]) + ".")


def _some(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
