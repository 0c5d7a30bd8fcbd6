"""Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / rank) · B A, with W frozen.

An adapted `X.weight` [O, I] gets `X.lora_A.weight` [rank, I] and `X.lora_B.weight` [O, rank]; B starts at zero, so a
fresh adapter changes nothing. `layers.linear` uses them wherever it finds them.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax.numpy as jnp
from jaxtyping import Array

from audio_grpo.errors import UserError
from audio_grpo.model.table import Table, Weight, Weights

A, B = ".lora_A.weight", ".lora_B.weight"


def lora_table(table: Table, *, rank: int, targets: Sequence[str]) -> Table:
    """Adapters of all weights whose name (without `.weight`) matches a pattern such as `*.self_attn.*_proj`.

    Raises:
        UserError: a pattern matches nothing, or something that is not a linear map.
    """
    adapters: dict[str, Weight] = {}
    for pattern in targets:
        names = [key.removesuffix(".weight") for key in table if fnmatchcase(key.removesuffix(".weight"), pattern)]
        names = [name for name in names if f"{name}.weight" in table]
        if not names:
            raise UserError(f"lora_target_modules {pattern} matches no weight; one of them is {_some_linear(table)}.")
        for name in names:
            adapters |= _adapter(name, table[f"{name}.weight"], rank, pattern)
    return adapters


def _adapter(name: str, weight: Weight, rank: int, pattern: str) -> Table:
    stacked = name.count("*")
    if len(weight.shape) != stacked + 2 or ".experts." in name or "embed_tokens" in name:
        raise UserError(f"lora_target_modules {pattern} matches {name}, which is not a linear map that can be adapted.")
    lead, axes = weight.shape[:stacked], weight.axes[:stacked]
    outputs, inputs = weight.shape[stacked:]
    return {
        name + A: Weight((*lead, rank, inputs), (*axes, None, weight.axes[-1]), unit=weight.unit),
        name + B: Weight((*lead, outputs, rank), (*axes, weight.axes[-2], None), "zeros", weight.unit),
    }


def _some_linear(table: Table) -> str:
    return next(key.removesuffix(".weight") for key in table if key.endswith("_proj.weight"))


def scaled(weights: Weights, scale: float) -> Weights:
    """The same weights with B times alpha / rank, which is how the model functions take them."""
    return {
        key: value * jnp.asarray(scale, value.dtype) if key.endswith(B) else value for key, value in weights.items()
    }


def merge_adapters(weights: Weights, scale: float) -> dict[str, Array]:
    """Adapted weights as plain ones, without adapters; everything else stays as it is."""
    merged = {key: value for key, value in weights.items() if not key.endswith((A, B))}
    for key in weights:
        if key.endswith(B):
            name = key.removesuffix(B)
            change = jnp.einsum(
                "...or,...ri->...oi", weights[key].astype(jnp.float32), weights[name + A].astype(jnp.float32)
            )
            plain = weights[f"{name}.weight"]
            merged[f"{name}.weight"] = (plain.astype(jnp.float32) + scale * change).astype(plain.dtype)
    return merged
