"""Reading manifests: rows that pair audio with transcripts."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from etils import epath

from audio_grpo.errors import UserError

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".mp4", ".webm", ".aiff", ".au", ".caf"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a manifest, not yet checked."""

    place: str
    """Where to find it, e.g. "train.csv line 7"."""
    folder: epath.Path
    """What a path in the row is relative to."""
    values: dict[str, Any]
    """By column; empty cells are left out."""


def read_rows(source: epath.Path) -> Iterator[Row]:
    """Rows of a .jsonl, .csv, .tsv or .parquet file, of a folder of .parquet files, or of a folder of audio files.

    In a folder of audio, at any depth, `x.wav` has its transcript in `x.txt`. Raises UserError for anything else.
    """
    if source.is_dir():
        tables = sorted(source.glob("*.parquet"))
        return (row for table in tables for row in _parquet_rows(table)) if tables else _folder_rows(source)
    if not source.is_file():
        raise UserError(f"{source} is not there: give a manifest or a folder")
    if source.suffix not in _READERS:
        raise UserError(f"{source} is no manifest: give a file that ends in {', '.join(_READERS)}, or a folder")
    return _READERS[source.suffix](source)


def _jsonl_rows(path: epath.Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path), start=1):
        if not line.strip():
            continue
        place = f"{path.name} line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{place} is not a JSON object: {line.strip()[:80]}")
        yield _row(place, path.parent, values)


def _csv_rows(path: epath.Path) -> Iterator[Row]:
    yield from _delimited_rows(path, ",")


def _tsv_rows(path: epath.Path) -> Iterator[Row]:
    yield from _delimited_rows(path, "\t")


def _delimited_rows(path: epath.Path, delimiter: str) -> Iterator[Row]:
    reader = csv.DictReader(_text(path), delimiter=delimiter, strict=True)
    try:
        for values in reader:
            place = f"{path.name} line {reader.line_num}"
            if None in values:
                raise UserError(f"{place} has more cells than the header: quote cells that hold {delimiter!r}")
            yield _row(place, path.parent, values)
    except csv.Error as error:
        raise UserError(f"{path.name} line {reader.line_num}: {error}") from error


def _text(path: epath.Path) -> io.StringIO:
    """The file's text with its line ends as they are; a byte-order mark is left out."""
    try:
        return io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error


def _parquet_rows(path: epath.Path) -> Iterator[Row]:
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise UserError("Parquet needs the extra `parquet`: pip install 'audio-grpo[parquet]'") from error
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
        except ValueError as error:
            raise UserError(f"{path} is no Parquet file: {error}") from error
        number = 0
        for batch in table.iter_batches(batch_size=64):
            for values in batch.to_pylist():
                yield _row(f"{path.name} row {number}", path.parent, values)
                number += 1


def _folder_rows(folder: epath.Path) -> Iterator[Row]:
    files = sorted(file for file in _files_below(folder) if file.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds neither audio files nor .parquet files")
    for file in files:
        name = str(file.relative_to(folder))
        transcript = file.with_suffix(".txt")
        text = transcript.read_text(encoding="utf-8").strip() if transcript.exists() else None
        yield _row(name, folder, {"audio": name, "text": text})


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _row(place: str, folder: epath.Path, values: dict[str, Any]) -> Row:
    return Row(place=place, folder=folder, values={k: v for k, v in values.items() if v is not None and v != ""})


_READERS: dict[str, Callable[[epath.Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
}
