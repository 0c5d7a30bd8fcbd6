"""Finding and reading the ArrayRecord files of a data set."""

import re
from dataclasses import dataclass

from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from audio_grpo.errors import UserError

_FILE_NAME = re.compile(r"\.array_?record")


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as the files hold it."""

    name: str
    """Its position in the data set, e.g. "record 17"."""
    content: bytes


@dataclass(frozen=True, slots=True)
class Unusable:
    """Takes the place of a record that can not be used."""

    name: str
    """The record's id, or its position in the data set."""
    reason: str
    """One of a small number of sentences, e.g. "longer than audio_max_seconds 30.0"."""


class RecordSource:
    """Random access to a data set's records; Grain and `inspect` read through it.

    `path` is a folder of files named `*.arrayrecord*` or `*.array_record*`, one file, or a glob; local, or gs://,
    which ArrayRecord opens itself. Other remote stores must be copied first. Files count in the order of their names.
    """

    def __init__(self, path: epath.PathLike) -> None:
        files = record_files(path)
        try:
            self._records = ArrayRecordDataSource(files)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} holds a file that is not a complete ArrayRecord file: {error}") from error
        if len(self._records) == 0:
            raise UserError(f"{path} holds no records")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> StoredRecord | Unusable:
        """Unusable is a record where the file is damaged."""
        name = f"record {index}"
        try:
            return StoredRecord(name, self._records[index])
        except RuntimeError:
            return Unusable(name, "the ArrayRecord file is damaged here")


def record_files(path: epath.PathLike) -> list[str]:
    """The ArrayRecord files of a folder, a file or a glob, sorted. Raises UserError where there are none."""
    root = epath.Path(path).expanduser()
    if re.match(r"(?!gs:)\w+://", str(root)):
        raise UserError(f"{path} can not be read in place: ArrayRecord reads local files and gs://. Copy it first")
    if root.is_file():
        return [str(root)]
    if root.is_dir():
        files = _files_in(root)
        if not files:
            splits = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and _files_in(folder))
            hint = f"; its sub-folders {', '.join(splits)} do: name one of them" if splits else ""
            raise UserError(f"{path} holds no files named *.arrayrecord{hint}")
        return files
    files = sorted(str(file) for file in _glob(root))
    if not files:
        raise UserError(f"{path} is no folder, no file and no glob that matches one: give ArrayRecord data")
    return files


def _files_in(folder: epath.Path) -> list[str]:
    return sorted(str(file) for file in folder.iterdir() if _FILE_NAME.search(file.name))


def _glob(pattern: epath.Path) -> list[epath.Path]:
    wild = [bool(re.search(r"[*?\[]", part)) for part in pattern.parts]
    if not any(wild):
        return []
    first = wild.index(True)
    return list(epath.Path(*pattern.parts[:first]).glob("/".join(pattern.parts[first:])))
