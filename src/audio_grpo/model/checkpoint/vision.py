"""The vision tower of Qwen3-Omni: never run here, but part of every complete checkpoint."""

from dataclasses import dataclass
from typing import Literal

from audio_grpo.model.table import Table, Weight

PREFIX = "visual."

Initializer = Literal["fan_in", "embedding", "ones", "zeros"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSpec:
    """Sizes of the vision tower."""

    width: int
    layers: int
    heads: int
    ffn: int
    output: int
    """The decoder's width."""
    patch: int
    """Pixels along a patch's side."""
    frames: int
    """Of one patch."""
    merge: int
    """Patches along a side that one output embedding stands for."""
    positions: int
    deepstack: tuple[int, ...]
    """Layers whose output also goes to the decoder."""


PUBLISHED_VISION = VisionSpec(
    width=1152,
    layers=27,
    heads=16,
    ffn=4304,
    output=2048,
    patch=16,
    frames=2,
    merge=2,
    positions=2304,
    deepstack=(8, 16, 24),
)
"""Qwen3-Omni-30B-A3B's."""


def smallest_vision(output: int) -> VisionSpec:
    """A vision tower that only fills its place: the published software always builds one."""
    return VisionSpec(
        width=8, layers=1, heads=1, ffn=8, output=output, patch=2, frames=1, merge=1, positions=1, deepstack=(0,)
    )


def vision_table(spec: VisionSpec) -> Table:
    """Weights of the vision tower."""
    merged = spec.width * spec.merge**2
    table: dict[str, Weight] = {}

    def add(key: str, shape: tuple[int, ...], init: Initializer = "fan_in") -> None:
        table[f"{PREFIX}{key}.weight"] = _unsharded(shape, init)
        table[f"{PREFIX}{key}.bias"] = _unsharded(shape[: key.count("*") + 1], "zeros")

    add("patch_embed.proj", (spec.width, 3, spec.frames, spec.patch, spec.patch))
    table[f"{PREFIX}pos_embed.weight"] = _unsharded((spec.positions, spec.width), "embedding")
    for name, outputs, inputs in (
        ("attn.qkv", 3 * spec.width, spec.width),
        ("attn.proj", spec.width, spec.width),
        ("mlp.linear_fc1", spec.ffn, spec.width),
        ("mlp.linear_fc2", spec.width, spec.ffn),
    ):
        add(f"blocks.*.{name}", (spec.layers, outputs, inputs))
    for name in ("norm1", "norm2"):
        add(f"blocks.*.{name}", (spec.layers, spec.width), "ones")
    for merger, lead, normed in (
        ("merger", (), spec.width),
        ("merger_list.*", (len(spec.deepstack),), merged),
    ):
        add(f"{merger}.ln_q", (*lead, normed), "ones")
        add(f"{merger}.mlp.0", (*lead, merged, merged))
        add(f"{merger}.mlp.2", (*lead, spec.output, merged))
    return table


def _unsharded(shape: tuple[int, ...], init: Initializer) -> Weight:
    return Weight(shape, (None,) * len(shape), init)
