"""Taking the answer out of what the model wrote: the one place that knows how."""

import re
from dataclasses import dataclass

from audio_grpo.config import Config, Template
from audio_grpo.text.prompts import ReasoningTags
from audio_grpo.text.special_tokens import ASR_TEXT

_DEFAULT_TAGS = ReasoningTags.from_config(Config())


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedAnswer:
    """What a completion answers."""

    text: str | None
    """The transcript, "" if the model wrote an empty one; None if it wrote none at all."""
    language: str | None = None
    """English name, where the model or the prompt states one."""


def parse_answer(
    template: Template, completion: str, tags: ReasoningTags, *, language: str | None = None
) -> ParsedAnswer:
    """The answer in a completion, before any normalisation.

    Args:
        template: "reasoning" answers between the solution tags (see `extract_transcription`), "transcript" with the
            whole text, "qwen3-asr" with what follows `<asr_text>`, or the whole text if the prompt forced a language.
        completion: decoded text without special tokens.
        tags: those that the prompt asked for.
        language: the language that `build_prompt` was given.
    """
    if template == "reasoning":
        text = extract_transcription(completion, tags.solution_start, tags.solution_end)
        return ParsedAnswer(text=text, language=language)
    if template == "transcript" or language is not None:
        return ParsedAnswer(text=completion.strip(), language=language)
    head, separator, transcript = completion.partition(ASR_TEXT)
    if not separator:
        return ParsedAnswer(text=None)
    named = re.fullmatch(r"\s*language (.+)", head)
    known = None if named is None or named[1] == "None" else named[1]
    return ParsedAnswer(text=transcript.strip(), language=known)


def extract_transcription(
    completion: str, start: str = _DEFAULT_TAGS.solution_start, end: str = _DEFAULT_TAGS.solution_end
) -> str | None:
    """The answer between the tags, stripped: "" where it is empty, None where none is closed.

    Of several answers the last counts, because an earlier one may be quoted in the reasoning. An answer holds no tag: a
    start tag that is opened twice counts from the second, and text after the first end tag is outside.
    """
    tag = f"(?:{re.escape(start)}|{re.escape(end)})"
    found = re.findall(f"{re.escape(start)}((?:(?!{tag}).)*){re.escape(end)}", completion, re.DOTALL)
    return found[-1].strip() if found else None


def forced_language(prompt: str) -> str | None:
    """The language that a decoded Qwen3-ASR prompt forces upon the answer, e.g. "Arabic"."""
    found = re.search(rf"language ([^\n]+){re.escape(ASR_TEXT)}\Z", prompt)
    return None if found is None else found[1]
