"""What sampled completions are worth: rewards and errors, each process judging its share of them."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from audio_grpo.grpo import Rollout
from audio_grpo.parallel.processes import gather, share_out
from audio_grpo.rewards import RewardFunction, RewardTable, score_completions
from audio_grpo.training.answers import ScoredAnswer, decode_completions, score_answers, token_ids
from audio_grpo.training.session import Session

_COLUMNS = ("ground_truth_text", "language", "id", "audio_seconds")
"""What reward functions are given of a batch."""


class Judgement(NamedTuple):
    """Of G completions of each of B prompts."""

    rewards: RewardTable
    answers: list[list[ScoredAnswer]]


def judge(session: Session, functions: list[RewardFunction], batch: dict[str, Any], rollout: Rollout) -> Judgement:
    """Judge a batch's completions, the same in all processes even where a reward function is not deterministic."""
    rows = share_out(len(batch["id"]))
    shares = gather(lambda: _judge_rows(session, functions, batch, rollout, rows) if len(rows) else None)
    parts = [part for part in shares if part is not None]
    values = np.concatenate([part.rewards.values for part in parts], axis=1)
    table = RewardTable(names=parts[0].rewards.names, values=values)
    return Judgement(table, [answers for part in parts for answers in part.answers])


def reward_table(
    session: Session,
    functions: list[RewardFunction],
    batch: dict[str, Any],
    texts: list[list[str]],
    ids: list[list[list[int]]],
) -> RewardTable:
    """What each function pays for a batch's completions, given as texts and as token ids."""
    column = session.config.prompt_column
    rows = zip(batch[column], batch[f"{column}_true_length"], strict=True)
    prompts = [session.tokenizer.decode(row[:length].tolist(), skip_special_tokens=True) for row, length in rows]
    columns = {name: list(batch[name]) for name in _COLUMNS}
    return score_completions(
        functions, prompts=prompts, completions=texts, completion_ids=ids, columns=columns, config=session.config
    )


def _judge_rows(
    session: Session,
    functions: list[RewardFunction],
    batch: dict[str, Any],
    rollout: Rollout,
    rows: Int[np.ndarray, "n"],
) -> Judgement:
    column = session.config.prompt_column
    own = {name: [batch[name][row] for row in rows] for name in (*_COLUMNS, column, f"{column}_true_length")}
    tokens, mask = rollout.tokens[rows], rollout.mask[rows]
    texts = decode_completions(session, tokens, mask)
    answers = [
        score_answers(session, group, [reference] * len(group), [language] * len(group))
        for group, reference, language in zip(texts, own["ground_truth_text"], own["language"], strict=True)
    ]
    return Judgement(reward_table(session, functions, own, texts, token_ids(tokens, mask)), answers)
