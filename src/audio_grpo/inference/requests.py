"""Rows and files as engine requests, and their grouping by length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from etils import epath

from audio_grpo.audio import audio_token_count, decode_audio, log_mel, resample
from audio_grpo.data.manifest import Row, read_rows
from audio_grpo.errors import UserError
from audio_grpo.inference.model import OpenModel
from audio_grpo.text import ReasoningTags, build_prompt
from audio_grpo.types import InputData

_SMALLEST_BUCKET = 128
"""Tokens; lengths are rounded up to this, then to doublings of it."""


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One row of a manifest for `generate` or `score`."""

    place: str
    values: dict[str, Any]
    request: InputData


def read_manifest(model: OpenModel, manifest: str) -> list[ManifestRow]:
    """Requests of a manifest's rows: `audio`, optionally `prompt_token_ids`, `language`.

    Raises:
        UserError: a row lacks its audio, or something in it cannot be read.
    """
    rows = list(read_rows(epath.Path(manifest).expanduser()))
    if not rows:
        raise UserError(f"{manifest} has no rows.")
    return [ManifestRow(row.place, row.values, _request(model, row, str(i))) for i, row in enumerate(rows)]


def _request(model: OpenModel, row: Row, name: str) -> InputData:
    if not isinstance(row.values.get("audio"), str):
        raise UserError(f"{row.place} has no audio: give the path of a file, relative to the manifest.")
    features = read_features(row.folder / row.values["audio"], model.spec.audio.mel_bins)
    tokens = token_ids(row.values, "prompt_token_ids", row.place, model.spec.decoder.vocab)
    if tokens is None:
        tokens = prompt_tokens(model, features.shape[1], row.values.get("language"))
    return InputData(id=name, tokens=tokens, true_length=len(tokens), audio_features=features)


def read_features(path: epath.PathLike, mel_bins: int) -> np.ndarray:
    """Log-mel features [M, F] of a whole audio file; the message of an error names the file."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    try:
        samples, rate = decode_audio(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return log_mel(resample(samples, rate), mel_bins)


def prompt_tokens(
    model: OpenModel, frames: int, language: str | None, instruction: str | None = None, context: str = ""
) -> np.ndarray:
    """The default prompt of the model's family around a clip of so many mel frames."""
    prompt = build_prompt(
        model.require_tokenizer(),
        model.config.template,
        audio_tokens=int(audio_token_count(frames, model.spec.audio.chunk_frames)),
        language=language or model.config.language,
        instruction=instruction or model.config.instruction,
        tags=ReasoningTags.from_config(model.config),
        context=context,
    )
    return np.asarray(prompt, np.int32)


def token_ids(values: dict[str, Any], column: str, place: str, vocab: int) -> np.ndarray | None:
    """A row's token ids; None where it has none.

    Raises:
        UserError: they are not ids of the vocabulary.
    """
    given = values.get(column)
    if given is None:
        return None
    fits = isinstance(given, list) and given and all(type(i) is int and 0 <= i < vocab for i in given)
    if not fits:
        raise UserError(f"{place}: {column} must be a list of token ids from 0 to {vocab - 1}, at least one.")
    return np.asarray(given, np.int32)


def bucket(length: int) -> int:
    """Length that a program is compiled for: 128, 256, 512, … so that their number stays small."""
    size = _SMALLEST_BUCKET
    while size < length:
        size *= 2
    return size


def by_bucket(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Buckets in use, each with the indices of the rows that belong to it."""
    order: Iterable[int] = sorted(range(len(lengths)), key=lambda i: bucket(lengths[i]))
    for size, indices in groupby(order, key=lambda i: bucket(lengths[i])):
        yield size, list(indices)
