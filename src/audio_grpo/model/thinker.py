"""The thinker: audio tower and decoder together. Pure functions of weights; each exists once for all of its uses."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from audio_grpo.model import audio_tower
from audio_grpo.model.attention import Projected, Segment, attend, own_segment
from audio_grpo.model.audio_tower import audio_tower_table
from audio_grpo.model.decoder import LAYERS, KeysValues, Stream, decoder_layer, decoder_table, finish_layer, project
from audio_grpo.model.experts import EXPERTS
from audio_grpo.model.flash import causal_attention, group_attention
from audio_grpo.model.grouped import OfLayer
from audio_grpo.model.layers import rms_norm
from audio_grpo.model.lora import scaled
from audio_grpo.model.router import Load, Routing, by_position, given_experts, load_of, of_layer, route_dtype
from audio_grpo.model.spec import ThinkerSpec, compute_dtype
from audio_grpo.model.table import Table, Weights, scope
from audio_grpo.parallel.activations import FEW_TOKENS, MANY_TOKENS, Placement
from audio_grpo.types import AudioBatch, PromptBatch, Routes


class Kept(NamedTuple):
    """What is kept of new positions."""

    cache: KeysValues
    """[L, S, K, Q, N]."""
    routes: Int[Array, "S Q Lk"] | None
    """Experts that the positions went to, as `Routes` has them, where `router_replay` asks for them."""


class GroupHidden(NamedTuple):
    """What a forward of groups gives."""

    hidden: Float[Array, "B G C D"]
    """Final hidden states that predict each completion token."""
    load: Load | None
    """Of the experts, by layer."""


def thinker_table(spec: ThinkerSpec) -> Table:
    """Every weight of the model."""
    return {**audio_tower_table(spec.audio), **decoder_table(spec.decoder)}


def output_head(weights: Weights) -> Float[Array, "V D"]:
    """Rows that turn a hidden state into logits: the head, or the embedding where they are tied."""
    return weights["lm_head.weight"] if "lm_head.weight" in weights else weights["model.embed_tokens.weight"]


def hear(spec: ThinkerSpec, weights: Weights, audio: AudioBatch) -> Float[Array, "B A D"]:
    """Embed B clips with the audio tower; see `audio_tower.hear`."""
    place = Placement(spec.mesh, MANY_TOKENS)
    return audio_tower.hear(spec.audio, scaled(weights, spec.lora_scale), audio, compute_dtype(spec), place)


def prefill(
    spec: ThinkerSpec, weights: Weights, prompts: PromptBatch, heard: Float[Array, "B A D"], audio_pad: int
) -> tuple[Float[Array, "B D"], Kept]:
    """Run B prompts; returns the final hidden state of each last token, and what is kept of all tokens."""
    place = Placement(spec.mesh, MANY_TOKENS)
    stream = _prompt_stream(spec, weights, prompts, heard, audio_pad, place)

    causal = partial(causal_attention, mesh=spec.mesh) if spec.flash else _causal

    def layer(x: Float[Array, "B T D"], w: Weights) -> tuple[Float[Array, "B T D"], Kept]:
        x, cache, routing = decoder_layer(spec.decoder, w, stream._replace(x=x), place, causal)
        return x, Kept(cache, _kept_routes(spec, routing, x))

    x, kept = jax.lax.scan(layer, stream.x, _layers(spec, weights))
    return _final_norm(spec, weights, _last(x, prompts)), _of_all_layers(kept)


def extend(
    spec: ThinkerSpec,
    weights: Weights,
    tokens: Int[Array, "S Q"],
    positions: Int[Array, "S Q"],
    cached: Sequence[Segment],
) -> tuple[Float[Array, "S Q D"], Kept]:
    """Run Q further tokens, few, of S sequences; the cached segments' keys and values are stacked over layers.

    Returns final hidden states and what is kept of the tokens.
    """
    place = Placement(spec.mesh, FEW_TOKENS)
    stream = Stream(_embed(spec, weights, tokens, place), positions)
    layers = _layers(spec, weights)
    # A step reads all experts: kernels that can read them where they lie spare a copy of each layer's.
    experts = scope(layers, EXPERTS)
    others = {key: value for key, value in layers.items() if not key.startswith(EXPERTS)}

    def layer(x: Float[Array, "S Q D"], scanned: tuple) -> tuple[Float[Array, "S Q D"], Kept]:
        number, w, keys_values = scanned
        matrices = {key: OfLayer(value, number) for key, value in experts.items()}
        segments = [
            segment._replace(keys=keys, values=values)
            for segment, (keys, values) in zip(cached, keys_values, strict=True)
        ]

        def attention(new: Projected) -> Float[Array, "S Q H N"]:
            return attend(new.queries, [*segments, own_segment(new)])

        x, cache, routing = decoder_layer(spec.decoder, w, stream._replace(x=x), place, attention, matrices)
        return x, Kept(cache, _kept_routes(spec, routing, x))

    stacked = [(segment.keys, segment.values) for segment in cached]
    x, new = jax.lax.scan(layer, stream.x, (jnp.arange(spec.decoder.layers), others, stacked))
    return _final_norm(spec, weights, x), _of_all_layers(new)


def group_forward(
    spec: ThinkerSpec,
    weights: Weights,
    prompts: PromptBatch,
    heard: Float[Array, "B A D"],
    completions: Int[Array, "B G C"],
    audio_pad: int,
    routes: Routes | None = None,
    counted: Bool[Array, "B G C"] | None = None,
) -> GroupHidden:
    """Run B prompts, each computed once for its G completions, which go to the experts of `routes` where these say any.

    Both streams pass each layer together, so a prompt's keys and values live for one layer only and gradients flow
    through them: T + G·C positions a group instead of G·(T + C). With `counted`, which tells a completion's tokens
    from padding, the load that these and the prompts' tokens are to the experts is told too, where there are experts.
    """
    groups, generations, length = completions.shape
    place = Placement(spec.mesh, MANY_TOKENS)
    prompt = _prompt_stream(spec, weights, prompts, heard, audio_pad, place)
    inputs = completions[:, :, :-1].reshape(groups * generations, length - 1)
    positions = jnp.repeat(prompts.true_length, generations)[:, None] + jnp.arange(length - 1)
    completion = Stream(_embed(spec, weights, inputs, place), positions)
    attention = partial(group_attention, mesh=spec.mesh) if spec.flash else _group_attention
    given = given_experts(routes, generations, length - 1)
    real = None if counted is None else _real_tokens(prompts, counted)

    def layer(xs: tuple[Array, Array], scanned: tuple) -> tuple[tuple[Array, Array], Load | None]:
        number, w = scanned
        new_prompt = project(spec.decoder, w, prompt._replace(x=xs[0]), place)
        new_completion = project(spec.decoder, w, completion._replace(x=xs[1]), place)
        x, y = attention(new_prompt, new_completion, prompts.true_length)
        to = [of_layer(spec.decoder, routes, number) for routes in given]
        x, of_prompt = finish_layer(spec.decoder, w, xs[0], x, place, given=to[0])
        y, of_completion = finish_layer(spec.decoder, w, xs[1], y, place, given=to[1])
        return (x, y), _load(real, of_prompt, of_completion)

    body = jax.checkpoint(layer) if spec.remat else layer
    numbers = None if routes is None else jnp.arange(spec.decoder.layers)
    (x, y), load = jax.lax.scan(body, (prompt.x, completion.x), (numbers, _layers(spec, weights)))
    first = jnp.broadcast_to(_last(x, prompts)[:, None, None], (groups, generations, 1, x.shape[-1]))
    hidden = jnp.concatenate([first, y.reshape(groups, generations, length - 1, -1)], axis=2)
    return GroupHidden(_final_norm(spec, weights, hidden), load)


def _kept_routes(spec: ThinkerSpec, routing: Routing | None, x: Float[Array, "S Q D"]) -> Int[Array, "S Q k"] | None:
    if routing is None or not spec.router_replay:
        return None
    return routing.chosen.astype(route_dtype(spec.decoder)).reshape(*x.shape[:2], -1)


def _of_all_layers(kept: Kept) -> Kept:
    """Routes, stacked over layers by a scan, by position."""
    return kept if kept.routes is None else kept._replace(routes=by_position(kept.routes))


def _real_tokens(
    prompts: PromptBatch, counted: Bool[Array, "B G C"]
) -> tuple[Bool[Array, "n_prompt"], Bool[Array, "n_completion"]]:
    """Which of all prompts' tokens and of all completions' inputs are no padding."""
    positions = jnp.arange(prompts.tokens.shape[1])
    return (positions < prompts.true_length[:, None]).reshape(-1), counted[:, :, :-1].reshape(-1)


def _load(real: tuple[Array, Array] | None, *routings: Routing | None) -> Load | None:
    """That of prompts and completions together in one layer."""
    if real is None:
        return None
    loads = [load_of(routing, which) for routing, which in zip(routings, real, strict=True) if routing is not None]
    return jax.tree.map(jnp.add, *loads) if loads else None


def _causal(new: Projected) -> Float[Array, "S Q H N"]:
    return attend(new.queries, [own_segment(new)])


def _group_attention(
    prompts: Projected, completions: Projected, prompt_lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T H N"], Float[Array, "BG C H N"]]:
    """What `flash.group_attention` gives, by segments."""
    real = (jnp.arange(prompts.keys.shape[1]) < prompt_lengths[:, None])[:, None, :]
    shared = own_segment(prompts)._replace(mask=real)
    return _causal(prompts), attend(completions.queries, [shared, own_segment(completions)])


def _layers(spec: ThinkerSpec, weights: Weights) -> Weights:
    """The decoder layers' weights under their names within a layer, stacked for a scan."""
    return scaled(scope(weights, LAYERS), spec.lora_scale)


def _prompt_stream(
    spec: ThinkerSpec,
    weights: Weights,
    prompts: PromptBatch,
    heard: Float[Array, "B A D"],
    audio_pad: int,
    place: Placement,
) -> Stream:
    """Token embeddings with audio embeddings at the placeholders, in order."""
    placeholder = prompts.tokens == audio_pad
    x = _embed(spec, weights, prompts.tokens, place)
    if heard.shape[1]:
        index = jnp.clip(jnp.cumsum(placeholder, axis=1) - 1, 0, heard.shape[1] - 1)
        audio = jnp.take_along_axis(heard.astype(x.dtype), index[..., None], axis=1)
        x = jnp.where(placeholder[..., None], audio, x)
    x = place(x, "batch", None, "embed")
    return Stream(x, jnp.broadcast_to(jnp.arange(x.shape[1]), prompts.tokens.shape))


def _embed(spec: ThinkerSpec, weights: Weights, tokens: Int[Array, "S Q"], place: Placement) -> Float[Array, "S Q D"]:
    embedded = weights["model.embed_tokens.weight"][tokens].astype(compute_dtype(spec))
    return place(embedded, "batch", None, "embed")


def _last(x: Float[Array, "B T D"], prompts: PromptBatch) -> Float[Array, "B D"]:
    return jax.vmap(partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False))(x, prompts.true_length - 1)


def _final_norm(spec: ThinkerSpec, weights: Weights, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    return rms_norm(x, weights["model.norm.weight"], spec.decoder.norm_eps)
