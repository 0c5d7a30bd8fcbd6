"""The conversation around a clip, as token ids, and what the model is to write in it.

"reasoning" and "transcript" are Qwen3-Omni's: no system turn, the clip first and the instruction after it. "qwen3-asr"
is Qwen3-ASR's: a system turn with context or nothing, the clip alone, and an answer that names the language.
"""

from dataclasses import dataclass
from typing import Self

from audio_grpo.config import Config, Template
from audio_grpo.errors import UserError
from audio_grpo.text.special_tokens import ASR_TEXT
from audio_grpo.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningTags:
    """Four distinct texts around the parts of a reasoned answer."""

    reasoning_start: str
    reasoning_end: str
    solution_start: str
    """E.g. "<answer>"."""
    solution_end: str

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """The configured tags."""
        return cls(
            reasoning_start=config.reasoning_start_token,
            reasoning_end=config.reasoning_end_token,
            solution_start=config.solution_start_token,
            solution_end=config.solution_end_token,
        )


def build_prompt(
    tokenizer: Tokenizer,
    template: Template,
    *,
    audio_tokens: int,
    language: str | None,
    instruction: str | None,
    tags: ReasoningTags,
    context: str = "",
) -> list[int]:
    """Token ids up to where the model begins to write.

    Args:
        tokenizer: of the model.
        template: which conversation.
        audio_tokens: tokens of the clip, one placeholder each (see `audio.audio_token_count`).
        language: English name of the spoken language; None where it is unknown. "qwen3-asr" forces it.
        instruction: text after the clip with {language} filled in; None takes the template's own.
        tags: what "reasoning" asks for.
        context: the system turn of "qwen3-asr": names and words that the clip may contain.

    Raises:
        UserError: the template has no place for the instruction or the context, {language} is unknown, or the
            tokenizer is not one for the template.
        ValueError: there are no audio tokens.
    """
    if audio_tokens < 1:
        raise ValueError(f"A clip has at least one audio token, not {audio_tokens}")
    placeholders = [tokenizer.token_id("<|audio_pad|>")] * audio_tokens
    audio = [tokenizer.token_id("<|audio_start|>"), *placeholders, tokenizer.token_id("<|audio_end|>")]
    if template == "qwen3-asr":
        if instruction is not None:
            raise UserError(f"Template qwen3-asr takes no instruction, but one is given: {instruction!r}")
        separator = tokenizer.token_id(ASR_TEXT)
        forced = [] if language is None else [*tokenizer.encode(f"language {language}"), separator]
        system = _turn(tokenizer, "system", tokenizer.encode(context))
        return [*system, *_turn(tokenizer, "user", audio), *_opening(tokenizer, "assistant"), *forced]
    if context:
        raise UserError(f"Template {template} has no system turn for a context, but one is given: {context!r}")
    text = _instruction(template, language, tags) if instruction is None else _fill(instruction, language)
    user = _turn(tokenizer, "user", [*audio, *tokenizer.encode(text)])
    return [*user, *_opening(tokenizer, "assistant")]


def target_text(template: Template, transcript: str, *, language: str | None, tags: ReasoningTags) -> str:
    """What the model should write after `build_prompt` with the same language; the stop token is not included."""
    if template == "reasoning":
        empty = tags.reasoning_start + tags.reasoning_end
        return f"{empty}{tags.solution_start}{transcript}{tags.solution_end}"
    if template == "qwen3-asr" and language is None:
        return f"language None{ASR_TEXT}{transcript}"
    return transcript


def target_tokens(
    tokenizer: Tokenizer, template: Template, transcript: str, *, language: str | None, tags: ReasoningTags, stop: int
) -> list[int]:
    """Token ids of `target_text`, with the stop token that ends them."""
    return [*tokenizer.encode(target_text(template, transcript, language=language, tags=tags)), stop]


def _opening(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.token_id("<|im_start|>"), *tokenizer.encode(f"{role}\n")]


def _turn(tokenizer: Tokenizer, role: str, content: list[int]) -> list[int]:
    return [*_opening(tokenizer, role), *content, tokenizer.token_id("<|im_end|>"), *tokenizer.encode("\n")]


def _instruction(template: Template, language: str | None, tags: ReasoningTags) -> str:
    task = _task(language)
    if template == "transcript":
        return task
    return (
        f"{task} First think briefly between {tags.reasoning_start} and {tags.reasoning_end}, "
        f"then write the transcript between {tags.solution_start} and {tags.solution_end}."
    )


def _task(language: str | None) -> str:
    """The sentences that the published evaluation uses, and a neutral one where no language is known."""
    if language is None:
        return "Transcribe the audio into text."
    return "请将这段中文语音转换为纯文本。" if language == "Chinese" else f"Transcribe the {language} audio into text."


def _fill(instruction: str, language: str | None) -> str:
    if "{language}" not in instruction:
        return instruction
    if language is None:
        raise UserError(
            f"The instruction {instruction!r} needs a language, but the record states none: set language, or give the "
            "records one"
        )
    return instruction.replace("{language}", language)
