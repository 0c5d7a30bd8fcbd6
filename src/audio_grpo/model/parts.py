"""Parts of the model that one wants to look at apart."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

_PATTERNS = {
    "*.lora_[AB].weight": "lora",
    "audio_tower.proj[12].*": "projector",
    "audio_tower.*": "audio_tower",
    "*.mlp.gate.weight": "router",
    "*.mlp.experts.*": "experts",
    "*.mlp.*": "mlp",
    "*.self_attn.*": "attention",
    "model.embed_tokens.weight": "embeddings",
    "lm_head.weight": "embeddings",
    "model.*norm.weight": "norms",
}
"""Pattern of published names to part; the first that matches decides."""


def part_of(key: str) -> str:
    """The part that a weight belongs to, e.g. "router" for "model.layers.*.mlp.gate.weight".

    Raises:
        ValueError: there is no part for such a weight.
    """
    for pattern, part in _PATTERNS.items():
        if fnmatchcase(key, pattern):
            return part
    raise ValueError(f"The weight {key} belongs to no part of the model: give {__name__} a pattern for it")


def by_part(keys: Iterable[str]) -> dict[str, list[str]]:
    """Weights of each part that has any."""
    parts: dict[str, list[str]] = {}
    for key in keys:
        parts.setdefault(part_of(key), []).append(key)
    return parts
