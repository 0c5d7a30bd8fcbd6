"""The audio tower: log-mel features to embeddings in the decoder's width, 13 a second.

Its attention never leaves an 8 s window and its positions restart in every 1 s chunk, so windows are independent of
each other: the tower runs on rows of windows, whichever clips they come from.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from audio_grpo.audio import audio_token_count
from audio_grpo.model.attention import Projected, attend, own_segment
from audio_grpo.model.layers import layer_norm, linear
from audio_grpo.model.packing import Rows, pack_windows
from audio_grpo.model.spec import AudioTowerSpec
from audio_grpo.model.table import Table, Weight, Weights, scope
from audio_grpo.parallel.activations import Placement
from audio_grpo.types import AudioBatch

PREFIX = "audio_tower."
_CHUNKS_AT_ONCE = 2
"""Of a row that a CPU convolves together."""


def audio_tower_table(spec: AudioTowerSpec) -> Table:
    """Weights of the tower."""
    width, channels, layers, head_width = spec.width, spec.channels, spec.layers, spec.width // spec.heads

    def vector(size: int, stacked: bool, init: Literal["ones", "zeros"]) -> Weight:
        return Weight((layers, size) if stacked else (size,), ("layers", None) if stacked else (None,), init)

    table: dict[str, Weight] = {}
    for i, inputs in enumerate((1, channels, channels), start=1):
        table[f"conv2d{i}.weight"] = Weight((channels, inputs, 3, 3), (None, None, None, None), "before_gelu")
        table[f"conv2d{i}.bias"] = vector(channels, False, "zeros")
    table["conv_out.weight"] = Weight((width, channels * spec.reduced_bins), ("audio_embed", None))
    for name in ("q_proj", "k_proj", "v_proj"):
        table[f"layers.*.self_attn.{name}.weight"] = Weight(
            (layers, width, width), ("layers", "audio_heads", "audio_embed"), unit=head_width
        )
        table[f"layers.*.self_attn.{name}.bias"] = vector(width, True, "zeros")
    table["layers.*.self_attn.out_proj.weight"] = Weight(
        (layers, width, width), ("layers", "audio_embed", "audio_heads"), unit=head_width
    )
    table["layers.*.self_attn.out_proj.bias"] = vector(width, True, "zeros")
    table["layers.*.fc1.weight"] = Weight((layers, spec.ffn, width), ("layers", "audio_mlp", "audio_embed"))
    table["layers.*.fc1.bias"] = vector(spec.ffn, True, "zeros")
    table["layers.*.fc2.weight"] = Weight((layers, width, spec.ffn), ("layers", "audio_embed", "audio_mlp"))
    table["layers.*.fc2.bias"] = vector(width, True, "zeros")
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        table[f"layers.*.{name}.weight"] = vector(width, True, "ones")
        table[f"layers.*.{name}.bias"] = vector(width, True, "zeros")
    table["ln_post.weight"], table["ln_post.bias"] = vector(width, False, "ones"), vector(width, False, "zeros")
    for name, outputs in (("proj1", width), ("proj2", spec.output)):
        table[f"{name}.weight"] = Weight((outputs, width), (None, "audio_embed"))
        table[f"{name}.bias"] = vector(outputs, False, "zeros")
    return {PREFIX + key: weight for key, weight in table.items()}


def hear(
    spec: AudioTowerSpec, weights: Weights, audio: AudioBatch, dtype: jnp.dtype, place: Placement
) -> Float[Array, "B A D"]:
    """Embed B clips; a clip's A' = audio_token_count(frames) tokens come first in its row, the rest is meaningless.

    A is that of F frames, rounded up to whole chunks. Clips are packed into rows, and rows without any are left out:
    it costs what there is to hear, whatever F.
    """
    devices = place.size("batch")
    parts = devices if audio.features.shape[0] % devices == 0 else 1
    clips = audio.features.shape[0] // parts
    features = jnp.pad(audio.features, ((0, 0), (0, 0), (0, -audio.features.shape[2] % spec.chunk_frames)))
    count = features.shape[2] // spec.chunk_frames
    chunks = features.reshape(parts, clips, spec.mel_bins, count, -1).transpose(0, 1, 3, 2, 4)
    chunks = place(chunks.reshape(parts, clips * count, spec.mel_bins, -1), "batch", None, None, None)
    starts = jnp.arange(count) * spec.chunk_frames
    frames = jnp.clip(audio.frames[:, None] - starts, 0, spec.chunk_frames).reshape(parts, -1)

    rows = Rows.for_clips(clips, count, spec.window_chunks)
    lengths = -(-audio.frames // spec.chunk_frames).reshape(parts, clips)
    packing = jax.vmap(lambda lengths: pack_windows(lengths, count, spec.window_chunks, rows))(lengths)
    w = scope(weights, PREFIX)

    def embed(chunk: Int[Array, "P R"]) -> Float[Array, "P R A D"]:
        row = jax.vmap(lambda part, index: part[index])(chunks.astype(dtype), chunk)
        heard = jnp.where(chunk < 0, 0, jnp.take_along_axis(frames, chunk, axis=1))
        window = jnp.where(chunk < 0, -1, chunk // count * count + chunk % count // spec.window_chunks)
        return _embed_row(spec, w, row, heard, window, place)

    def hear_row(_: None, chunk: Int[Array, "P R"]) -> tuple[None, Float[Array, "P R A D"]]:
        silence = jnp.zeros((*chunk.shape, spec.chunk_tokens, spec.output), dtype)
        return None, jax.lax.cond((chunk >= 0).any(), embed, lambda _: silence, chunk)

    _, embeddings = jax.lax.scan(hear_row, None, packing.chunk.swapaxes(0, 1))
    by_part = embeddings.swapaxes(0, 1).reshape(parts, -1, spec.chunk_tokens, spec.output)
    in_order = jax.vmap(lambda part, index: part[index])(by_part, packing.place)
    return place(in_order.reshape(parts * clips, -1, spec.output), "batch", None, None)


def _embed_row(
    spec: AudioTowerSpec,
    weights: Weights,
    chunks: Float[Array, "P R M f"],
    frames: Int[Array, "P R"],
    window: Int[Array, "P R"],
    place: Placement,
) -> Float[Array, "P R A D"]:
    """Embed R chunks side by side, of which those of equal `window` attend to each other."""
    parts, length = window.shape
    audible_frames = jnp.arange(spec.chunk_frames) < frames[..., None, None]
    heard = jnp.where(audible_frames, chunks, 0.0)
    x = place(_convolve_chunks(spec, weights, heard, frames > 0, place), "batch", None, None)
    audible = jnp.arange(spec.chunk_tokens) < audio_token_count_of(spec, frames)[..., None]
    of_token = jnp.repeat(window, spec.chunk_tokens, axis=1)
    mask = (of_token[:, :, None] == of_token[:, None, :]) & audible.reshape(parts, 1, -1)

    def layer(x: Float[Array, "P A D"], w: Weights) -> tuple[Float[Array, "P A D"], None]:
        return place(_encoder_layer(spec, w, x, mask), "batch", None, None), None

    x, _ = jax.lax.scan(layer, x, scope(weights, "layers.*."))
    x = layer_norm(weights, "ln_post", x)
    x = linear(weights, "proj2", jax.nn.gelu(linear(weights, "proj1", x), approximate=False))
    return x.reshape(parts, length, -1, spec.output)


def audio_token_count_of(spec: AudioTowerSpec, frames: Int[Array, "P R"]) -> Int[Array, "P R"]:
    """Audio tokens of each chunk, from a table so that one formula serves host and device."""
    counts = audio_token_count(np.arange(spec.chunk_frames + 1), spec.chunk_frames)
    return jnp.asarray(counts, jnp.int32)[frames]


def _convolve_chunks(
    spec: AudioTowerSpec,
    weights: Weights,
    chunks: Float[Array, "P R M f"],
    audible: Bool[Array, "P R"],
    place: Placement,
) -> Float[Array, "P A D"]:
    convolutions = [
        (weights[f"conv2d{i}.weight"].astype(chunks.dtype), weights[f"conv2d{i}.bias"].astype(chunks.dtype))
        for i in (1, 2, 3)
    ]

    def through(x: Float[Array, "n h w c"], convolve: Callable[..., Array]) -> Float[Array, "n H W o"]:
        for kernel, bias in convolutions:
            x = jax.nn.gelu(convolve(x, kernel) + bias, approximate=False)
        return x

    x = chunks[..., None]
    if place.platform == "cpu":
        # On several devices all run: exchanges within a branch are made beside others, and have left XLA no thread.
        alone = place.mesh is None or place.mesh.size == 1
        # A convolution within a loop or a branch keeps to one thread there, and few chunks at once stay in the cache.
        x = _audible_few(
            partial(through, convolve=shifted_products), x.swapaxes(0, 1), audible.T if alone else None
        ).swapaxes(0, 1)
        x = x.reshape(-1, *x.shape[2:])
    else:
        x = through(x.reshape(-1, *x.shape[2:]), _convolve)
    x = linear(weights, "conv_out", x.transpose(0, 2, 3, 1).reshape(x.shape[0], x.shape[2], -1))
    x = x + _sinusoids(x.shape[1], spec.width).astype(x.dtype)
    return x.reshape(chunks.shape[0], -1, spec.width)


def _audible_few(
    run: Callable[[Array], Array], chunks: Float[Array, "R P *rest"], audible: Bool[Array, "R P"] | None
) -> Float[Array, "R P *others"]:
    """Run a few chunks of each part at a time; those few of which none is audible give zeros instead.

    All are run where `audible` is None.
    """
    count, padding = len(chunks), -len(chunks) % _CHUNKS_AT_ONCE

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1)))
        return padded.reshape(-1, _CHUNKS_AT_ONCE, *x.shape[1:])

    def few(given: tuple[Array, Array | None]) -> Array:
        some, heard = given
        if heard is None:
            return jax.vmap(run)(some)
        silence = jax.eval_shape(jax.vmap(run), some)
        return jax.lax.cond(heard.any(), jax.vmap(run), lambda _: jnp.zeros(silence.shape, silence.dtype), some)

    x = jax.lax.map(few, (cut(chunks), None if audible is None else cut(audible)))
    return x.reshape(-1, *x.shape[2:])[:count]


def _convolve(x: Float[Array, "n h w c"], kernel: Float[Array, "o c 3 3"]) -> Float[Array, "n H W o"]:
    """Stride 2 with one row and column of zeros around."""
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "OIHW", "NHWC"))


def shifted_products(x: Float[Array, "n h w c"], kernel: Float[Array, "o c 3 3"]) -> Float[Array, "n H W o"]:
    """The same as a sum of nine matrix products, one for each place in the kernel."""
    height, width = (2 * (-(-size // 2)) for size in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (1, height - x.shape[1] + 1), (1, width - x.shape[2] + 1), (0, 0)))
    places = [(i, j) for i in range(3) for j in range(3)]
    return sum(
        (padded[:, i : i + height : 2, j : j + width : 2] @ kernel[:, :, i, j].T for i, j in places),
        start=jnp.zeros((), x.dtype),
    )


def _sinusoids(length: int, width: int) -> Float[Array, "length D"]:
    """Sines of all frequencies, then cosines; the table is not in published checkpoints."""
    half = width // 2
    inverse_scales = np.exp(-np.log(10000.0) / (half - 1) * np.arange(half))
    angles = np.arange(length)[:, None] * inverse_scales
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)


def _encoder_layer(
    spec: AudioTowerSpec, w: Weights, x: Float[Array, "P A D"], mask: Bool[Array, "P A A"]
) -> Float[Array, "P A D"]:
    def heads(name: str, y: Float[Array, "P A D"]) -> Float[Array, "P A H N"]:
        return linear(w, f"self_attn.{name}", y).reshape(*y.shape[:2], spec.heads, -1)

    y = layer_norm(w, "self_attn_layer_norm", x)
    new = Projected(heads("q_proj", y), heads("k_proj", y), heads("v_proj", y))
    x = x + linear(
        w, "self_attn.out_proj", attend(new.queries, [own_segment(new)._replace(mask=mask)]).reshape(x.shape)
    )
    y = layer_norm(w, "final_layer_norm", x)
    return x + linear(w, "fc2", jax.nn.gelu(linear(w, "fc1", y), approximate=False))
