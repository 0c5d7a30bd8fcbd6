"""A reward on the length of a completion, in tokens."""

from collections.abc import Sequence

from audio_grpo.config import Config


def soft_overlong_punishment_reward(
    completion_ids: Sequence[Sequence[int]], config: Config | None = None, **_: object
) -> list[float]:
    """`soft_overlong_punishment` of each completion's length, which counts its stop token.

    Args:
        completion_ids: token ids of each completion.
        config: gives `max_completion_length` and `soft_punish_cache`; None takes the defaults, which punish nothing.
    """
    settings = config or Config()
    return [
        soft_overlong_punishment(len(ids), settings.max_completion_length, settings.soft_punish_cache)
        for ids in completion_ids
    ]


def soft_overlong_punishment(length: int, max_completion_len: int, soft_punish_cache: int) -> float:
    """0 up to `max_completion_len` − `soft_punish_cache` tokens, from there falling to −1 at `max_completion_len`.

    DAPO, arXiv 2503.14476, eq. 13.
    """
    excess = length - (max_completion_len - soft_punish_cache)
    if excess <= 0:
        return 0.0
    return -1.0 if length > max_completion_len else -excess / soft_punish_cache
