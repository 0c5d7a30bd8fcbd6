"""The transformations from a record to a batch, for Grain's `map`, `batch` and `filter`, in order of use.

Elements are dictionaries; each stage's docstring says which entries it replaces by which. A record that turns out
unusable is replaced by `Unusable`, which the later stages pass on to the main process, where it is counted.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audio_grpo.audio import audio_token_count, log_mel, resample
from audio_grpo.config import Template
from audio_grpo.data.records import decode_record, load_samples
from audio_grpo.data.source import StoredRecord, Unusable
from audio_grpo.errors import UserError
from audio_grpo.text import ReasoningTags, Tokenizer, build_prompt, target_tokens

Element = dict[str, Any]


class _Stage(abc.ABC):
    """One step; an unusable record passes through as it is."""

    def __call__(self, element: Any) -> Any:
        return element if isinstance(element, Unusable) else self._map(element)

    @abc.abstractmethod
    def _map(self, element: Any) -> Any: ...


@dataclass(frozen=True)
class ParseAudioFeatures(_Stage):
    """A stored record → `id`, `text`, `language`, `samples` [n] float32 mono, `sampling_rate` and `audio_seconds`.

    Unusable are records that break the schema, whose audio can not be decoded, without text, and too short or long.
    """

    min_seconds: float
    max_seconds: float

    def _map(self, element: StoredRecord) -> Element | Unusable:
        name = element.name
        try:
            record = decode_record(element.content)
            name = record.id or name
            samples, rate = load_samples(record)
        except UserError as error:
            return Unusable(name, str(error))
        seconds = len(samples) / rate
        if seconds < self.min_seconds:
            return Unusable(name, f"shorter than audio_min_seconds {self.min_seconds}")
        if seconds > self.max_seconds:
            return Unusable(name, f"longer than audio_max_seconds {self.max_seconds}")
        if not record.text.strip():
            return Unusable(name, "the record has no text")
        return {
            "id": name,
            "text": record.text,
            "language": record.language,
            "samples": samples,
            "sampling_rate": rate,
            "audio_seconds": np.float32(seconds),
        }


class ResampleAudio(_Stage):
    """`samples`, `sampling_rate` → `samples` at 16 kHz."""

    def _map(self, element: Element) -> Element:
        rate = element.pop("sampling_rate")
        return {**element, "samples": resample(element["samples"], rate)}


@dataclass(frozen=True)
class AudioToMelSpectrogram(_Stage):
    """Adds `audios` [M, frames] float32 to `samples`."""

    num_mel_bins: int

    def _map(self, element: Element) -> Element:
        return {**element, "audios": log_mel(element["samples"], self.num_mel_bins)}


@dataclass(frozen=True)
class BuildAudioGRPOPrompt(_Stage):
    """Adds the prompt's token ids under `prompt_column`, [tokens] int32, one placeholder for each audio token.

    Unusable are records whose prompt exceeds `max_length` tokens, or for which the template lacks something.
    """

    tokenizer: Tokenizer
    template: Template
    instruction: str | None
    tags: ReasoningTags
    default_language: str | None
    prompt_column: str
    max_length: int

    def _map(self, element: Element) -> Element | Unusable:
        language = element["language"] or self.default_language
        try:
            tokens = build_prompt(
                self.tokenizer,
                self.template,
                audio_tokens=audio_token_count(element["audios"].shape[1]),
                language=language,
                instruction=self.instruction,
                tags=self.tags,
            )
        except UserError as error:
            return Unusable(element["id"], str(error))
        if len(tokens) > self.max_length:
            return Unusable(element["id"], f"its prompt is longer than max_prefill_predict_length {self.max_length}")
        return {**element, "language": language, self.prompt_column: np.array(tokens, np.int32)}


@dataclass(frozen=True)
class RequireTranscriptFits(_Stage):
    """Leaves elements as they are, once their `language` is settled.

    Unusable are records whose transcript, as the template has it, exceeds `max_length` tokens with its stop token.
    """

    tokenizer: Tokenizer
    template: Template
    tags: ReasoningTags
    stop: int
    max_length: int

    def _map(self, element: Element) -> Element | Unusable:
        settings = {"language": element["language"], "tags": self.tags, "stop": self.stop}
        tokens = target_tokens(self.tokenizer, self.template, element["text"], **settings)
        if len(tokens) > self.max_length:
            reason = f"its transcript exceeds the {self.max_length} tokens that max_target_length leaves a completion"
            return Unusable(element["id"], reason)
        return element


@dataclass(frozen=True)
class PadAudioGRPOToMaxLength(_Stage):
    """Prompt and `audios` → the same, filled up to `max_length` tokens and `max_frames` frames, with true lengths.

    Adds `<prompt_column>_true_length` and `audios_true_length`, int32.
    """

    prompt_column: str
    max_length: int
    max_frames: int
    pad_token: int

    def _map(self, element: Element) -> Element:
        tokens, audio = element[self.prompt_column], element["audios"]
        beyond_tokens, beyond_frames = self.max_length - len(tokens), self.max_frames - audio.shape[1]
        return {
            **element,
            self.prompt_column: np.pad(tokens, (0, beyond_tokens), constant_values=self.pad_token),
            f"{self.prompt_column}_true_length": np.int32(len(tokens)),
            "audios": np.pad(audio, ((0, 0), (0, beyond_frames))),
            "audios_true_length": np.int32(audio.shape[1]),
        }


class Batch(_Stage):
    """Elements → one whose arrays are stacked; what has a length of its own (text, `samples`) is listed."""

    def _map(self, element: Sequence[Element]) -> Element:
        columns = {name: [single[name] for single in element] for name in element[0]}
        return {
            name: np.stack(v) if isinstance(v[0], np.ndarray | np.generic) and name != "samples" else v
            for name, v in columns.items()
        }


class CollectGroundTruth(_Stage):
    """A batch's `text` → `ground_truth_text`, a list of B transcripts."""

    def _map(self, element: Element) -> Element:
        text = element.pop("text")
        return {**element, "ground_truth_text": text}
