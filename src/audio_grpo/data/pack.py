"""Packing a manifest into ArrayRecord files."""

import difflib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated

from etils import epath
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StringConstraints, ValidationError

from audio_grpo.data.manifest import Row, read_rows
from audio_grpo.data.records import is_encoded_audio
from audio_grpo.data.write import new_folder, write_records
from audio_grpo.errors import UserError
from audio_grpo.types import AudioRecord

_SHOWN_PROBLEMS = 20


class _AudioStruct(BaseModel):
    """Audio as Hugging Face data sets hold it in Parquet."""

    content: bytes | None = Field(None, alias="bytes")
    path: str | None = None


class _Columns(BaseModel):
    """What a row may have."""

    model_config = ConfigDict(extra="forbid")

    audio: str | bytes | _AudioStruct
    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    sampling_rate: PositiveInt | None = None
    language: str | None = None
    id: str | None = None

    @property
    def path(self) -> str | None:
        if isinstance(self.audio, _AudioStruct):
            return self.audio.path or None
        return self.audio if isinstance(self.audio, str) else None

    @property
    def content(self) -> bytes | None:
        if isinstance(self.audio, _AudioStruct):
            return self.audio.content
        return self.audio if isinstance(self.audio, bytes) else None

    @property
    def name(self) -> str | None:
        return self.id or (str(PurePosixPath(self.path).with_suffix("")) if self.path else None)


def pack(source: epath.PathLike, out: Path, *, shards: int = 1) -> int:
    """Packs `source` into the new folder `out` and returns the number of records.

    `source` is a .jsonl, .csv, .tsv or .parquet file, a folder of .parquet files, or a folder of audio files with a
    .txt beside each; local or remote. Its columns are `audio` (a path relative to the manifest; in Parquet also bytes,
    or a struct of `bytes` and `path`), `text`, and optionally `sampling_rate`, `language` and `id`, which is otherwise
    the audio's path without its suffix. Audio files are kept byte for byte.

    Raises UserError that lists everything wrong with the source; `out` is then not made.
    """
    with new_folder(out) as folder:
        return write_records(_records(epath.Path(source).expanduser()), folder, shards=shards)


def _records(source: epath.Path) -> Iterator[AudioRecord]:
    """Records up to the first problem; then reads on to find all problems, and raises UserError."""
    problems: dict[str, None] = {}  # in order of appearance, each once
    names: set[str] = set()
    row = None
    for row in read_rows(source):
        try:
            columns = _Columns.model_validate(row.values)
        except ValidationError as error:
            problems.update(dict.fromkeys(_sentences(row.place, error)))
            continue
        problems.update(dict.fromkeys(_content_problems(row, columns, names)))
        if not problems:
            yield _record(row, columns)
    if row is None:
        raise UserError(f"{source} has no rows")
    if problems:
        shown = list(problems)[:_SHOWN_PROBLEMS]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise UserError(f"{source} can not be packed:\n" + "\n".join([*shown, *more]))


def _sentences(place: str, error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        column = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(column, _Columns.model_fields, n=1)
            known = ", ".join(_Columns.model_fields)
            yield f"unknown column {column}: " + (f"did you mean {near[0]}?" if near else f"known are {known}")
        elif problem["type"] in ("missing", "string_too_short"):
            yield f"{place} has no {column}"
        else:
            yield f"{place}: {column} {problem['input']!r:.80}: {problem['msg']}"


def _content_problems(row: Row, columns: _Columns, names: set[str]) -> Iterator[str]:
    """What is wrong with a row whose columns are all right; adds its name to those seen."""
    if columns.name in names:
        yield f"{row.place}: id {columns.name} is there twice"
    if columns.name is not None:
        names.add(columns.name)
    content = columns.content
    if content is None:
        if columns.path is None:
            yield f"{row.place}: audio has neither bytes nor a path"
            return
        file = row.folder / columns.path
        if not file.is_file():
            yield f"{row.place}: {file} is not there"
            return
        with file.open("rb") as opened:
            content = opened.read(16)
    if not is_encoded_audio(content):
        yield f"{row.place}: {columns.name or 'audio'} is no audio file known by its first bytes: convert it to flac"


def _record(row: Row, columns: _Columns) -> AudioRecord:
    content = columns.content
    return AudioRecord(
        audio=(row.folder / str(columns.path)).read_bytes() if content is None else content,
        text=columns.text,
        sampling_rate=columns.sampling_rate,
        language=columns.language,
        id=columns.name,
    )
