"""The text decoder: one layer function for prefill, decode and scoring."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from audio_grpo.model.attention import Projected, heads_first
from audio_grpo.model.experts import experts_mlp
from audio_grpo.model.grouped import Matrices
from audio_grpo.model.layers import linear, rms_norm, rope
from audio_grpo.model.router import Routing, route
from audio_grpo.model.spec import DecoderSpec
from audio_grpo.model.table import Table, Weight, Weights
from audio_grpo.parallel.activations import Placement

LAYERS = "model.layers.*."


class KeysValues(NamedTuple):
    """Keys and values of new positions, as segments have them; stacked over layers where a scan returns them."""

    keys: Float[Array, "*L S K Q N"]
    values: Float[Array, "*L S K Q N"]


Attention = Callable[[Projected], Float[Array, "S Q H N"]]
"""What new positions attend to: at least causally to each other."""


class Stream(NamedTuple):
    """New positions of S sequences, Q each."""

    x: Float[Array, "S Q D"]
    positions: Int[Array, "S Q"]


def decoder_table(spec: DecoderSpec) -> Table:
    """Weights of the decoder."""
    table = {
        "model.embed_tokens.weight": Weight((spec.vocab, spec.width), ("vocab", None), "embedding"),
        "model.norm.weight": Weight((spec.width,), (None,), "ones"),
    }
    if not spec.tied:
        table["lm_head.weight"] = Weight((spec.vocab, spec.width), ("vocab", None))
    return table | {LAYERS + key: weight for key, weight in _layer_table(spec).items()}


def _layer_table(spec: DecoderSpec) -> dict[str, Weight]:
    layers, width = spec.layers, spec.width
    queries, keys = spec.heads * spec.head_width, spec.kv_heads * spec.head_width
    table = {
        f"{name}.weight": Weight((layers, size), ("layers", None), "ones")
        for name, size in (
            ("input_layernorm", width),
            ("post_attention_layernorm", width),
            ("self_attn.q_norm", spec.head_width),
            ("self_attn.k_norm", spec.head_width),
        )
    }
    unit = spec.head_width
    table["self_attn.q_proj.weight"] = Weight((layers, queries, width), ("layers", "heads", "embed"), unit=unit)
    table["self_attn.k_proj.weight"] = Weight((layers, keys, width), ("layers", "kv_heads", "embed"), unit=unit)
    table["self_attn.v_proj.weight"] = Weight((layers, keys, width), ("layers", "kv_heads", "embed"), unit=unit)
    table["self_attn.o_proj.weight"] = Weight((layers, width, queries), ("layers", "embed", "heads"), unit=unit)
    if spec.experts:
        inner, lead = spec.expert_width, (layers, spec.experts)
        axes, embed, prefix = ("layers", "expert"), "expert_embed", "mlp.experts.*."
        table["mlp.gate.weight"] = Weight((layers, spec.experts, width), ("layers", None, "embed"))
    else:
        inner, lead = spec.mlp_width, (layers,)
        axes, embed, prefix = ("layers",), "embed", "mlp."
    table[f"{prefix}gate_proj.weight"] = Weight((*lead, inner, width), (*axes, "mlp", embed))
    table[f"{prefix}up_proj.weight"] = Weight((*lead, inner, width), (*axes, "mlp", embed))
    table[f"{prefix}down_proj.weight"] = Weight((*lead, width, inner), (*axes, embed, "mlp"))
    return table


def decoder_layer(
    spec: DecoderSpec,
    w: Weights,
    stream: Stream,
    place: Placement,
    attention: Attention,
    experts: Matrices | None = None,
) -> tuple[Float[Array, "S Q D"], KeysValues, Routing | None]:
    """One layer on new positions; `experts` are its experts' matrices where they are not among its weights.

    Returns the new hidden states, the new positions' keys and values, which a caller may keep as a segment, and to
    which experts the positions went, where there are any.
    """
    new = project(spec, w, stream, place)
    x, routing = finish_layer(spec, w, stream.x, attention(new), place, experts)
    return x, KeysValues(heads_first(new.keys), heads_first(new.values)), routing


def project(spec: DecoderSpec, w: Weights, stream: Stream, place: Placement) -> Projected:
    """The first half of a layer, up to attention."""
    y = rms_norm(stream.x, w["input_layernorm.weight"], spec.norm_eps)

    def heads(name: str) -> Float[Array, "S Q heads N"]:
        flat = linear(w, f"self_attn.{name}_proj", y, wide=place.cuts_width)
        return place(flat.reshape(*y.shape[:2], -1, spec.head_width), "cached", None, "heads", None)

    def rotated(name: str) -> Float[Array, "S Q heads N"]:
        normal = rms_norm(heads(name), w[f"self_attn.{name}_norm.weight"], spec.norm_eps)
        return rope(normal, stream.positions, spec.rope_theta)

    return Projected(rotated("q"), rotated("k"), heads("v"))


def finish_layer(
    spec: DecoderSpec,
    w: Weights,
    x: Float[Array, "S Q D"],
    attended: Float[Array, "S Q H N"],
    place: Placement,
    experts: Matrices | None = None,
    given: Int[Array, "S Q k"] | None = None,
) -> tuple[Float[Array, "S Q D"], Routing | None]:
    """The second half of a layer, from what attention gave; `experts` as `decoder_layer` has them.

    With `given` experts, positions go to these. Returns the new hidden states and where positions went.
    """
    flat = place(attended.reshape(*x.shape[:2], -1), "batch", None, "heads")
    x = place(x + linear(w, "self_attn.o_proj", flat), "batch", None, "embed")
    y = rms_norm(x, w["post_attention_layernorm.weight"], spec.norm_eps)
    if not spec.experts:
        return place(x + _mlp(w, y, place), "batch", None, "embed"), None
    tokens = y.reshape(-1, spec.width)
    chosen = None if given is None else given.reshape(-1, spec.experts_per_token)
    routing = route(spec, w, tokens, wide=place.cuts_width, given=chosen)
    added = experts_mlp(spec, w, tokens, routing, place, experts).reshape(y.shape)
    return place(x + added, "batch", None, "embed"), routing


def _mlp(w: Weights, y: Float[Array, "S Q D"], place: Placement) -> Float[Array, "S Q D"]:
    gate, up = (linear(w, f"mlp.{name}_proj", y, wide=place.cuts_width) for name in ("gate", "up"))
    inner = jax.nn.silu(gate) * up
    return linear(w, "mlp.down_proj", place(inner, "batch", None, "mlp"))
