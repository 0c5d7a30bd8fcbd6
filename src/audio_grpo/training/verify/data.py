"""Checks of what goes in: the configuration and a batch."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from audio_grpo.audio import audio_token_count
from audio_grpo.config import Config, load_config, to_yaml
from audio_grpo.data.pipeline import padded_frames, prompts_per_step
from audio_grpo.model.table import parameter_count
from audio_grpo.training.session import Session
from audio_grpo.training.verify.check import Finding, span
from audio_grpo.types import SkippedRecords


def configuration_loads(session: Session) -> Finding:
    """The resolved configuration, written as a run keeps it, loads to the same values."""
    config = session.config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yml")
        path.write_text(to_yaml(config))
        loaded = load_config(str(path))
    keys = Config.model_fields
    differing = [key for key in keys if getattr(loaded, key) != getattr(config, key)]
    if differing:
        return Finding(False, f"changed by writing and loading the resolved configuration: {', '.join(differing)}")
    return Finding(
        True,
        f"{len(keys)} keys, equal when the resolved configuration is loaded again; {config.model_name} with "
        f"{parameter_count(session.table):,} parameters on {session.devices}",
    )


def batch_is_sound(session: Session, batch: dict[str, Any], skipped: SkippedRecords) -> Finding:
    """A training batch has every column in its shape, a placeholder for each audio token, and padding where it says."""
    problems = [*_wrong_arrays(session, batch), *_wrong_lists(session, batch)] or [*_wrong_contents(session, batch)]
    if problems:
        return Finding(False, "; ".join(problems))
    column = session.config.prompt_column
    left_out = {reason: len(names) for reason, names in skipped.reasons.items()}
    return Finding(
        True,
        f"{column} {list(batch[column].shape)} with {span(batch[f'{column}_true_length'], 'tokens')}, audios "
        f"{list(batch['audios'].shape)} with {span(batch['audios_true_length'], 'frames')}, zero beyond them, and "
        f"{span(_placeholders(session, batch))} placeholders, one for each audio token; of the first {skipped.seen} "
        f"records {sum(left_out.values())} are left out" + "".join(f", {n} × {why}" for why, n in left_out.items()),
    )


def _wrong_arrays(session: Session, batch: dict[str, Any]) -> Iterator[str]:
    config, column = session.config, session.config.prompt_column
    count, length = _count(session), config.max_prefill_predict_length
    frames = padded_frames(config.audio_max_seconds, length)
    expected = {
        column: ((count, length), np.int32),
        f"{column}_true_length": ((count,), np.int32),
        "audios": ((count, config.num_mel_bins_for_audio, frames), np.float32),
        "audios_true_length": ((count,), np.int32),
        "audio_seconds": ((count,), np.float32),
    }
    for name, (shape, dtype) in expected.items():
        given = batch.get(name)
        found = f"{given.dtype}{list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
        if found != (asked := f"{np.dtype(dtype)}{list(shape)}"):
            yield f"{name} is {found}, not {asked}"


def _wrong_lists(session: Session, batch: dict[str, Any]) -> Iterator[str]:
    count = _count(session)
    for name in ("samples", "ground_truth_text", "id", "language"):
        given = batch.get(name)
        if not isinstance(given, list) or len(given) != count:
            yield f"{name} is {type(given).__name__}, not a list of {count}"


def _wrong_contents(session: Session, batch: dict[str, Any]) -> Iterator[str]:
    column = session.config.prompt_column
    tokens, audios = batch[column], batch["audios"]
    length, frames = batch[f"{column}_true_length"], batch["audios_true_length"]
    if not ((length >= 1) & (length <= tokens.shape[1])).all():
        yield f"{column}_true_length has {span(length)}, not 1 to {tokens.shape[1]}"
    if not ((frames >= 1) & (frames <= audios.shape[2])).all():
        yield f"audios_true_length has {span(frames)}, not 1 to {audios.shape[2]}"
    if not np.isfinite(audios).all():
        yield "audios has values that are not finite"
    for b, (text, name) in enumerate(zip(batch["ground_truth_text"], batch["id"], strict=True)):
        placeholders = _placeholders(session, batch)[b]
        asked = audio_token_count(int(frames[b]), session.spec.audio.chunk_frames)
        if placeholders != asked:
            yield f"{name} has {placeholders} placeholders for {asked} audio tokens"
        if (tokens[b, length[b] :] != session.special.pad).any():
            yield f"{name} has tokens other than padding beyond its {length[b]}"
        if audios[b, :, frames[b] :].any():
            yield f"{name} has features beyond its {frames[b]} frames"
        if not text.strip():
            yield f"{name} has no ground_truth_text"


def _placeholders(session: Session, batch: dict[str, Any]) -> np.ndarray:
    return (batch[session.config.prompt_column] == session.special.audio_pad).sum(axis=1)


def _count(session: Session) -> int:
    return prompts_per_step(session.config, session.mesh.size)
