"""Transcripts of files."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from audio_grpo.errors import UserError
from audio_grpo.inference.generate import answer, as_record
from audio_grpo.inference.model import OpenModel
from audio_grpo.inference.requests import bucket, prompt_tokens, read_features
from audio_grpo.text import ReasoningTags, parse_answer
from audio_grpo.types import InputData

_TOKENS_PER_SECOND = 12
"""Twice what fast speech takes in a language of many tokens to a word."""
_TOKENS_AT_LEAST = 64
_FRAMES_PER_SECOND = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What one file says."""

    audio: str
    text: str
    language: str | None
    """Where the model or the caller names it."""
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    """"length": the model was still writing when its tokens ran out, so the text is not whole."""
    audio_seconds: float
    seconds: float
    """That decoding, hearing and writing took."""


def transcribe(
    model: OpenModel, files: Sequence[str], *, language: str | None = None, prompt: str | None = None
) -> Iterator[Transcript]:
    """Transcribe files greedily, one after another.

    Args:
        model: the opened checkpoint.
        files: any audio or video that the audio libraries read, heard whole.
        language: English name of the language spoken; None leaves it to the model.
        prompt: the instruction after the clip; for Qwen3-ASR, context such as names that the clip may hold.
    """
    for file in files:
        started = time.perf_counter()
        features = read_features(file, model.spec.audio.mel_bins)
        asr = model.config.template == "qwen3-asr"
        words: dict[str, Any] = {"context": prompt or ""} if asr else {"instruction": prompt}
        tokens = prompt_tokens(model, features.shape[1], language, **words)
        seconds = features.shape[1] / _FRAMES_PER_SECOND
        (result,) = answer(
            model,
            [InputData(id=file, tokens=tokens, true_length=len(tokens), audio_features=features)],
            generations=1,
            temperature=0,
            max_new_tokens=bucket(round(_TOKENS_AT_LEAST + _TOKENS_PER_SECOND * seconds)),
            seed=0,
        )
        record = as_record(model, result.completions[0])
        parsed = parse_answer(
            model.config.template, record.pop("text"), ReasoningTags.from_config(model.config), language=language
        )
        if parsed.text is None:
            raise UserError(
                f"{file}: the model wrote no answer in the form of template {model.config.template}; the checkpoint "
                "was not trained for it."
            )
        yield Transcript(
            audio=file,
            text=parsed.text,
            language=parsed.language,
            audio_seconds=seconds,
            seconds=time.perf_counter() - started,
            **record,
        )
