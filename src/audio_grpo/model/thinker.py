"""The thinker: audio tower and decoder together. Pure functions of weights; each exists once for all of its uses."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from audio_grpo.model import audio_tower
from audio_grpo.model.attention import Projected, Segment, attend, own_segment
from audio_grpo.model.audio_tower import audio_tower_table
from audio_grpo.model.decoder import LAYERS, KeysValues, Stream, decoder_layer, decoder_table, finish_layer, project
from audio_grpo.model.experts import EXPERTS
from audio_grpo.model.flash import causal_attention, group_attention
from audio_grpo.model.grouped import OfLayer
from audio_grpo.model.layers import rms_norm
from audio_grpo.model.lora import scaled
from audio_grpo.model.spec import ThinkerSpec, compute_dtype
from audio_grpo.model.table import Table, Weights, scope
from audio_grpo.parallel.activations import FEW_TOKENS, MANY_TOKENS, Placement
from audio_grpo.types import AudioBatch, PromptBatch


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
) -> tuple[Float[Array, "B D"], KeysValues]:
    """Run B prompts; returns the final hidden state of each last token and all keys and values [L, B, K, T, N]."""
    place = Placement(spec.mesh, MANY_TOKENS)
    stream = _prompt_stream(spec, weights, prompts, heard, audio_pad, place)

    causal = partial(causal_attention, mesh=spec.mesh) if spec.flash else _causal

    def layer(x: Float[Array, "B T D"], w: Weights) -> tuple[Float[Array, "B T D"], KeysValues]:
        return decoder_layer(spec.decoder, w, stream._replace(x=x), place, causal)

    x, cache = jax.lax.scan(layer, stream.x, _layers(spec, weights))
    return _final_norm(spec, weights, _last(x, prompts)), cache


def extend(
    spec: ThinkerSpec,
    weights: Weights,
    tokens: Int[Array, "S Q"],
    positions: Int[Array, "S Q"],
    cached: Sequence[Segment],
) -> tuple[Float[Array, "S Q D"], KeysValues]:
    """Run Q further tokens, few, of S sequences; the cached segments' keys and values are stacked over layers.

    Returns final hidden states and the new keys and values [L, S, K, Q, N].
    """
    place = Placement(spec.mesh, FEW_TOKENS)
    stream = Stream(_embed(spec, weights, tokens, place), positions)
    layers = _layers(spec, weights)
    # A step reads all experts: kernels that can read them where they lie spare a copy of each layer's.
    experts = scope(layers, EXPERTS)
    others = {key: value for key, value in layers.items() if not key.startswith(EXPERTS)}

    def layer(x: Float[Array, "S Q D"], scanned: tuple) -> tuple[Float[Array, "S Q D"], KeysValues]:
        number, w, keys_values = scanned
        matrices = {key: OfLayer(value, number) for key, value in experts.items()}
        segments = [
            segment._replace(keys=keys, values=values)
            for segment, (keys, values) in zip(cached, keys_values, strict=True)
        ]

        def attention(new: Projected) -> Float[Array, "S Q H N"]:
            return attend(new.queries, [*segments, own_segment(new)])

        return decoder_layer(spec.decoder, w, stream._replace(x=x), place, attention, matrices)

    stacked = [(segment.keys, segment.values) for segment in cached]
    x, new = jax.lax.scan(layer, stream.x, (jnp.arange(spec.decoder.layers), others, stacked))
    return _final_norm(spec, weights, x), new


def group_hidden(
    spec: ThinkerSpec,
    weights: Weights,
    prompts: PromptBatch,
    heard: Float[Array, "B A D"],
    completions: Int[Array, "B G C"],
    audio_pad: int,
) -> Float[Array, "B G C D"]:
    """Final hidden states that predict each completion token; prompts are computed once for their G completions.

    Both streams pass each layer together, so a prompt's keys and values live for one layer only and gradients flow
    through them: T + G·C positions a group instead of G·(T + C).
    """
    groups, generations, length = completions.shape
    place = Placement(spec.mesh, MANY_TOKENS)
    prompt = _prompt_stream(spec, weights, prompts, heard, audio_pad, place)
    inputs = completions[:, :, :-1].reshape(groups * generations, length - 1)
    positions = jnp.repeat(prompts.true_length, generations)[:, None] + jnp.arange(length - 1)
    completion = Stream(_embed(spec, weights, inputs, place), positions)
    attention = partial(group_attention, mesh=spec.mesh) if spec.flash else _group_attention

    def layer(xs: tuple[Array, Array], w: Weights) -> tuple[tuple[Array, Array], None]:
        new_prompt = project(spec.decoder, w, prompt._replace(x=xs[0]), place)
        new_completion = project(spec.decoder, w, completion._replace(x=xs[1]), place)
        x, y = attention(new_prompt, new_completion, prompts.true_length)
        return (finish_layer(spec.decoder, w, xs[0], x, place), finish_layer(spec.decoder, w, xs[1], y, place)), None

    body = jax.checkpoint(layer) if spec.remat else layer
    (x, y), _ = jax.lax.scan(body, (prompt.x, completion.x), _layers(spec, weights))
    first = jnp.broadcast_to(_last(x, prompts)[:, None, None], (groups, generations, 1, x.shape[-1]))
    hidden = jnp.concatenate([first, y.reshape(groups, generations, length - 1, -1)], axis=2)
    return _final_norm(spec, weights, hidden)


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
