"""What a step of GRPO tells of its rewards, answers and lengths."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32

from audio_grpo.grpo import Advantages, Rollout
from audio_grpo.rewards import EditCounts, RewardTable, falls_into_loop, is_in_wrong_script
from audio_grpo.training.answers import ScoredAnswer
from audio_grpo.training.durations import duration_of


def reward_metrics(
    table: RewardTable,
    total: Float32[np.ndarray, "B G"],
    advantages: Advantages,
    seconds: Float[np.ndarray, "B"],
) -> dict[str, float]:
    """Rewards of sampled completions, and how many groups of equal ones teach nothing, also by their clips' duration.

    A group whose transcript was injected has an advantage more, and teaches where the transcript earns another reward.
    """
    metrics = {
        "reward": float(total.mean()),
        "reward_std": float(total.astype(np.float64).std(axis=1, ddof=1).mean()),
        "frac_reward_zero_std": advantages.frac_reward_zero_std,
    }
    alike = (advantages.values == 0).all(axis=1)
    durations = np.array([duration_of(each) for each in seconds])
    for duration in np.unique(durations):
        share = float(alike[durations == duration].mean())
        metrics[f"frac_reward_zero_std/{duration.replace(' ', '_')}"] = share
    for name, values in zip(table.names, table.values, strict=True):
        metrics[f"rewards/{name}/mean"] = float(values.mean())
        metrics[f"rewards/{name}/std"] = float(values.std())
    return metrics


def transcript_metrics(total: Float32[np.ndarray, "B n"], advantages: Advantages) -> dict[str, float]:
    """What transcripts earn, which are the last of each group's n = G + 1."""
    return {
        "transcript/reward": float(total[:, -1].mean()),
        "transcript/advantage": float(advantages.values[:, -1].mean()),
    }


def answer_metrics(answers: Sequence[Sequence[ScoredAnswer]], references: Sequence[str]) -> dict[str, float]:
    """Errors per reference word over all B groups, and the shares of answers that went wrong in other ways.

    An answer is empty where there is none or no word in it; `answers/length_ratio` is words per reference word.
    """
    pairs = [(answer, reference) for group, reference in zip(answers, references, strict=True) for answer in group]
    words = sum((answer.words for answer, _ in pairs), EditCounts())
    counts = {
        "wer": words.errors,
        "errors/substitution_rate": words.substitutions,
        "errors/deletion_rate": words.deletions,
        "errors/insertion_rate": words.insertions,
        "answers/length_ratio": words.hypothesis_length,
    }
    wrong = {
        "answers/empty_rate": [answer.words.hypothesis_length == 0 for answer, _ in pairs],
        "answers/repetition_rate": [falls_into_loop(answer.text, reference) for answer, reference in pairs],
        "answers/wrong_script_rate": [
            is_in_wrong_script(answer.answer or "", reference) for answer, reference in pairs
        ],
    }
    per_word = {name: count / max(1, words.reference_length) for name, count in counts.items()}
    return per_word | {name: sum(flags) / len(pairs) for name, flags in wrong.items()}


def length_metrics(rollout: Rollout) -> dict[str, float]:
    """Tokens of completions, and the share of those that were cut off."""
    lengths = rollout.mask.sum(axis=2)
    reasons = [reason for group in rollout.finish_reasons for reason in group]
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": reasons.count("length") / len(reasons),
    }
