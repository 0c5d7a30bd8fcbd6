"""From completions to texts, answers and error counts: shared by training and evaluation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from audio_grpo.rewards import EditCounts, character_edits, word_edits
from audio_grpo.text import get_normalizer, parse_answer
from audio_grpo.training.session import Session


class ScoredAnswer(NamedTuple):
    """One completion as text, against its reference."""

    text: str
    """Everything that was written, control tokens left out."""
    answer: str | None
    """The transcript in it; None where there is none."""
    words: EditCounts
    characters: EditCounts


def token_ids(tokens: Int[np.ndarray, "B G C"], mask: Bool[np.ndarray, "B G C"]) -> list[list[list[int]]]:
    """Each completion's tokens without padding."""
    groups = zip(tokens, mask, strict=True)
    return [[ids[real].tolist() for ids, real in zip(*group, strict=True)] for group in groups]


def decode_completions(
    session: Session, tokens: Int[np.ndarray, "B G C"], mask: Bool[np.ndarray, "B G C"]
) -> list[list[str]]:
    """Texts of all completions, control tokens left out."""
    return [
        [session.tokenizer.decode(ids, skip_special_tokens=True) for ids in group] for group in token_ids(tokens, mask)
    ]


def score_answers(
    session: Session, texts: Sequence[str], references: Sequence[str], languages: Sequence[str | None]
) -> list[ScoredAnswer]:
    """Errors of each text's answer after normalisation; no answer counts as an empty one."""
    rule = get_normalizer(session.config.text_normalizer)
    scored = []
    for text, reference, language in zip(texts, references, languages, strict=True):
        answer = parse_answer(session.config.template, text, session.tags, language=language).text
        pair = rule(reference), rule(answer or "")
        scored.append(ScoredAnswer(text, answer, word_edits(*pair), character_edits(*pair)))
    return scored
