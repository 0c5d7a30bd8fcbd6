"""What training leaves as it is: parts of the model by their keys, and weights by pattern."""

from fnmatch import fnmatchcase

from audio_grpo.config import Config
from audio_grpo.config.files import nearest
from audio_grpo.errors import UserError
from audio_grpo.model.parts import part_of
from audio_grpo.model.table import Table


def frozen_weights(config: Config, table: Table) -> dict[str, str]:
    """Keys of frozen weights, each with the configuration key that freezes it.

    A pattern is matched against names with and without their `.weight` or `.bias`.

    Raises:
        UserError: a pattern matches nothing, or every weight is frozen.
    """
    parts = _frozen_parts(config)
    frozen = {key: parts[part_of(key)] for key in table if part_of(key) in parts}
    for pattern in config.freeze_patterns:
        matched = [key for key in table if fnmatchcase(key, pattern) or fnmatchcase(key.rpartition(".")[0], pattern)]
        if not matched:
            raise UserError(
                f"freeze_patterns {pattern} matches no weight; the nearest is {nearest(pattern, list(table), 0)}. "
                "In names * stands for all layers or all experts, which freeze together."
            )
        frozen = dict.fromkeys(matched, "freeze_patterns") | frozen
    if frozen.keys() == table.keys():
        raise UserError(
            f"Every weight is frozen, by {', '.join(sorted(set(frozen.values())))}: nothing is left to learn. Freeze "
            "less."
        )
    return frozen


def _frozen_parts(config: Config) -> dict[str, str]:
    """Each with the key that freezes it."""
    alone = config.freeze_projector_params is not None
    keys = {
        "audio_tower": "freeze_audio_encoder_params",
        "projector": "freeze_projector_params" if alone else "freeze_audio_encoder_params",
        "router": "freeze_router_params",
        "embeddings": "freeze_embedding_params",
    }
    return {part: key for part, key in keys.items() if getattr(config, key)}
