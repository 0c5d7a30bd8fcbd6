"""What a run tells while it goes: metrics of every step and sampled completions."""

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import soundfile
from etils import epath
from jaxtyping import Float32

from audio_grpo.errors import UserError
from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.types import FinishReason

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

Phase = Literal["sft", "grpo"]

CLIP_SAMPLING_RATE = 16_000
_LINE_KEYS = frozenset({"step", "phase", "non_finite"})


class MetricsWriter:
    """Writes each step's metrics as one JSON line, at once, and as TensorBoard events where wanted."""

    def __init__(self, run: RunFolder, phase: Phase, *, resume_step: int = 0, tensorboard: bool = True):
        """Makes the phase's metrics those of the first `resume_step` steps: later lines are dropped.

        Args:
            run: Where metrics.jsonl and the TensorBoard folder are.
            phase: Which training the steps belong to; other phases' lines stay.
            resume_step: Steps that are done, 0 at the start; the next one is written as `resume_step + 1`.
            tensorboard: Whether to write events too.
        """
        self._phase: Phase = phase
        self._last_step = resume_step
        self._file = JsonLinesFile(run.metrics_path)
        self._file.keep(lambda record: record["phase"] != phase or record["step"] <= resume_step)
        self._events = _event_writer(run.tensorboard / phase, resume_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one step, e.g. `write(7, {"reward": 1.25, "completions/mean_length": 12.5})`.

        Raises ValueError for a step that does not follow the last one and for a metric named like a line's own key.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} was written after step {self._last_step}")
        if taken := _LINE_KEYS & metrics.keys():
            raise ValueError(f"metrics can not be named {sorted(taken)}: every line has these keys")
        self._last_step = step
        values = {name: float(value) for name, value in metrics.items()}
        self._file.append({"step": step, "phase": self._phase, **values})
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends the event file."""
        if self._events:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledCompletion:
    """One sampled answer and what it was worth: one line of completions.jsonl."""

    step: int
    clip_id: str
    """The record's name, e.g. "speaker3/utt_00017"."""
    language: str | None
    reference: str
    """The transcript as the data has it."""
    completion: str
    """The whole sampled text, tags included."""
    hypothesis: str | None
    """The transcript taken out of it; None where there was none to take."""
    wer: float
    rewards: Mapping[str, float]
    """By reward function, before weighting."""
    reward: float
    """The weighted sum."""
    advantage: float
    length: int
    """Tokens, the stop token included."""
    finish_reason: FinishReason
    audio: str | None = None
    """Name of the clip's file in the run's clips folder; None where the audio was not kept."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """From one line of completions.jsonl; raises UserError for a line with other fields."""
        try:
            return cls(**record)
        except TypeError as error:
            raise UserError(
                f"A completion of step {record.get('step')!r} does not have the fields of one ({error}): "
                "completions.jsonl was changed or comes from another version."
            ) from error


class CompletionsWriter:
    """Writes sampled completions as JSON lines, and the audio that they answer."""

    def __init__(self, run: RunFolder, *, resume_step: int = 0):
        """Drops the completions of steps after `resume_step`."""
        self._run = run
        self._file = JsonLinesFile(run.completions_path)
        self._file.keep(lambda record: record["step"] <= resume_step)

    def write(self, completion: SampledCompletion, samples: Float32[np.ndarray, "samples"] | None = None) -> None:
        """Writes one completion.

        Args:
            completion: Its `audio` is filled in here.
            samples: The clip, mono at 16 kHz in −1..1, kept as FLAC once however often it is given.
        """
        audio = None if samples is None else self._save_clip(completion.clip_id, samples)
        self._file.append(asdict(replace(completion, audio=audio)))

    def _save_clip(self, clip_id: str, samples: Float32[np.ndarray, "samples"]) -> str:
        readable = re.sub(r"[^A-Za-z0-9.-]+", "_", clip_id)[-40:]
        name = f"{readable}-{hashlib.sha256(samples.tobytes()).hexdigest()[:12]}.flac"
        if not (self._run.clips / name).exists():
            self._run.clips.mkdir(parents=True, exist_ok=True)
            encoded = io.BytesIO()
            soundfile.write(encoded, samples, CLIP_SAMPLING_RATE, format="FLAC")
            (self._run.clips / name).write_bytes(encoded.getvalue())
        return name


def _event_writer(folder: epath.Path, resume_step: int) -> "SummaryWriter":
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resume_step + 1)
