"""Files of one JSON object per line that grow while a run goes."""

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from audio_grpo.errors import UserError

Record = dict[str, Any]


class Records(NamedTuple):
    """What a file holds."""

    records: list[Record]
    unfinished: str
    """Text behind the last line end: a line that is being written, or was when its run was killed."""


def encode_record(record: Mapping[str, Any]) -> str:
    """One line of valid JSON.

    JSON has neither NaN nor infinity: such a number becomes null, and "non_finite" says what it was, e.g.
    `{"step": 3, "kl": null, "non_finite": {"kl": "nan"}}`. Raises ValueError for one inside a list.
    """
    numbers, non_finite = _split_non_finite(record)
    noted = numbers | {"non_finite": non_finite} if non_finite else numbers
    return json.dumps(noted, ensure_ascii=False, allow_nan=False)


def decode_record(line: str) -> Record:
    """The record that `encode_record` made the line of, NaN and infinities included.

    Raises ValueError for anything but a JSON object.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"{line[:40]!r} is not a JSON object")
    return _with_non_finite(record, record.pop("non_finite", {}))


class JsonLinesFile:
    """Appends records and reads them back; a file that does not exist holds none."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._is_remote = "://" in os.fspath(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line, at once."""
        line = encode_record(record) + "\n"
        if self._is_remote:  # object stores can not append
            self._path.write_text(self._text() + line)
        else:
            with self._path.open("a") as file:
                file.write(line)

    def read(self) -> Records:
        """All complete lines; raises UserError for one that is not a JSON object."""
        *lines, unfinished = self._text().split("\n")
        return Records([self._decode(number, line) for number, line in enumerate(lines, 1)], unfinished)

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Rewrites the file with only the wanted records, and without an unfinished last line."""
        *lines, unfinished = self._text().split("\n")
        kept = [line for number, line in enumerate(lines, 1) if wanted(self._decode(number, line))]
        if unfinished or len(kept) < len(lines):
            replacement = self._path.with_name(self._path.name + ".new")
            replacement.write_text("".join(line + "\n" for line in kept))
            replacement.replace(self._path)

    def _text(self) -> str:
        return self._path.read_text() if self._path.exists() else ""

    def _decode(self, number: int, line: str) -> Record:
        try:
            return decode_record(line)
        except ValueError as error:
            raise UserError(
                f"Line {number} of {self._path} is not a JSON object ({error}): the file was changed or damaged. "
                "Remove that line or restore the file."
            ) from error


def _split_non_finite(record: Mapping[str, Any]) -> tuple[Record, Record]:
    numbers, non_finite = {}, {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers[name], below = _split_non_finite(value)
            non_finite |= {name: below} if below else {}
        elif isinstance(value, float) and not math.isfinite(value):
            numbers[name], non_finite[name] = None, str(value)
        else:
            numbers[name] = value
    return numbers, non_finite


def _with_non_finite(record: Record, non_finite: Record) -> Record:
    restored = {
        name: _with_non_finite(record[name], value) if isinstance(value, dict) else float(value)
        for name, value in non_finite.items()
    }
    return record | restored
