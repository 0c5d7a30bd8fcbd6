"""Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / rank) · B A, with W frozen.

An adapted `X.weight` [O, I] gets `X.lora_A.weight` [rank, I] and `X.lora_B.weight` [O, rank]; B starts at zero, so a
fresh adapter changes nothing. Experts have an adapter each, stacked as their matrices are. `layers.linear` and
`grouped.grouped_mlp` use them wherever they find them.
"""

import zlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from audio_grpo.errors import UserError
from audio_grpo.model.table import Table, Weight, Weights

A, B = ".lora_A.weight", ".lora_B.weight"

Adapted = tuple[Float[Array, "*E O I"], Float[Array, "*E rank I"], Float[Array, "*E O rank"]]
"""A weight and its adapter's A and B."""


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
    if len(weight.shape) != stacked + 2 or "embed_tokens" in name:
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


def drop_inputs(weights: Weights, key: Key[Array, ""], rate: float) -> dict[str, Array]:
    """The same weights with adapters that each leave out a share of their inputs and weigh the others 1 / (1 − rate).

    Dropout of whole features: a draw holds for all tokens, and each layer, and each expert, has its own.
    """

    def dropped(name: str, a: Float[Array, "*L rank I"]) -> Float[Array, "*L rank I"]:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        keep = jax.random.bernoulli(own, 1 - rate, (*a.shape[:-2], 1, a.shape[-1]))
        return jnp.where(keep, a / (1 - rate), 0)

    return {name: dropped(name, value) if name.endswith(A) else value for name, value in weights.items()}


def are_fresh(adapters: Weights) -> bool:
    """Whether adapters change nothing yet."""
    return not any(jnp.any(value) for key, value in adapters.items() if key.endswith(B))


def merge_adapters(weights: Weights, scale: float) -> dict[str, Array]:
    """Adapted weights as plain ones, without adapters; everything else stays as it is."""
    merged = {key: value for key, value in weights.items() if not key.endswith((A, B))}
    for key in weights:
        if key.endswith(B):
            name = key.removesuffix(B)
            plain = merged[f"{name}.weight"]
            merge = _merge_layers if plain.ndim > 2 else _merge
            merged[f"{name}.weight"] = merge((plain, weights[name + A], weights[key]), scale)
    return merged


@partial(jax.jit, static_argnames="scale")
def _merge_layers(stacked: Adapted, scale: float) -> Float[Array, "*E O I"]:
    """One layer at a time: all experts' matrices in float32 may be larger than what is left of a host's memory."""
    return jax.lax.map(lambda layer: _merge(layer, scale), stacked)


def _merge(adapted: Adapted, scale: float) -> Float[Array, "*E O I"]:
    weight, a, b = adapted
    change = jnp.einsum("...or,...ri->...oi", b.astype(jnp.float32), a.astype(jnp.float32))
    return (weight.astype(jnp.float32) + scale * change).astype(weight.dtype)
