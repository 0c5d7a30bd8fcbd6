"""Sizes of a model as plain values: all that the model functions know of a configuration."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.model.flash import flash_supports


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioTowerSpec:
    """Sizes of the audio tower."""

    width: int
    layers: int
    heads: int
    ffn: int
    channels: int
    """Of the convolutions."""
    output: int
    """The decoder's width."""
    mel_bins: int = 128
    chunk_frames: int = 100
    """Mel frames that one convolution sees; positions restart in every chunk."""
    window_frames: int = 800
    """Mel frames that attend to each other."""

    @property
    def chunk_tokens(self) -> int:
        """Audio tokens of a full chunk, e.g. 13."""
        return _halved_three_times(self.chunk_frames)

    @property
    def reduced_bins(self) -> int:
        """Mel bins after the convolutions, e.g. 16."""
        return _halved_three_times(self.mel_bins)

    @property
    def window_chunks(self) -> int:
        """Chunks in one attention window, e.g. 8."""
        return self.window_frames // self.chunk_frames


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Sizes of the text decoder."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    """Of the dense MLP, where there are no experts."""
    experts: int
    experts_per_token: int
    expert_width: int
    norm_topk: bool
    vocab: int
    tied: bool
    """The output head is the embedding."""
    rope_theta: float
    norm_eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkerSpec:
    """Sizes, number format and devices of the whole model."""

    audio: AudioTowerSpec
    decoder: DecoderSpec
    dtype: Literal["float32", "bfloat16"]
    """Of activations and matrix products."""
    remat: bool = True
    """Recompute each layer in the backward pass."""
    router_replay: bool = False
    """Prefill and decoding tell which experts each token went to."""
    lora_scale: float = 1.0
    """alpha / rank of the adapters, where the weights have any."""
    flash: bool = False
    """Attention of many tokens holds no scores (see `model.flash`)."""
    mesh: Mesh | None = None
    """Devices over which activations are laid out; None leaves that to the compiler."""


def thinker_spec(config: Config, mesh: Mesh | None = None) -> ThinkerSpec:
    """Take the model's sizes from a configuration; audio sizes left open shrink with the decoder."""
    width = config.d_model_for_audio or config.emb_dim
    return ThinkerSpec(
        audio=AudioTowerSpec(
            width=width,
            layers=config.encoder_layers_for_audio or config.num_decoder_layers,
            heads=config.encoder_attention_heads_for_audio or config.num_query_heads,
            ffn=config.encoder_ffn_dim_for_audio or 4 * width,
            channels=config.downsample_hidden_size_for_audio or max(1, width // 4),
            output=config.emb_dim,
            mel_bins=config.num_mel_bins_for_audio,
            chunk_frames=2 * config.n_window_for_audio,
            window_frames=config.n_window_infer_for_audio,
        ),
        decoder=DecoderSpec(
            layers=config.num_decoder_layers,
            width=config.emb_dim,
            heads=config.num_query_heads,
            kv_heads=config.num_kv_heads,
            head_width=config.head_dim,
            mlp_width=config.mlp_dim,
            experts=config.num_experts,
            experts_per_token=config.num_experts_per_tok,
            expert_width=config.moe_mlp_dim,
            norm_topk=config.norm_topk_prob,
            vocab=config.vocab_size,
            tied=config.logits_via_embedding,
            rope_theta=config.rope_max_timescale,
            norm_eps=config.normalization_layer_epsilon,
        ),
        dtype=resolve_dtype(config.dtype, mesh),
        remat=config.remat_policy == "full",
        lora_scale=config.lora_alpha / max(1, config.lora_rank),
        flash=_takes_flash(config, _platform(mesh)),
        mesh=mesh,
    )


def resolve_dtype(
    name: Literal["auto", "float32", "bfloat16"], mesh: Mesh | None = None
) -> Literal["float32", "bfloat16"]:
    """Give "auto" its meaning on the mesh's devices, or this machine's: float32 on CPU, bfloat16 on accelerators."""
    if name != "auto":
        return name
    return "float32" if _platform(mesh) == "cpu" else "bfloat16"


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _takes_flash(config: Config, platform: str) -> bool:
    possible = platform == "tpu" and flash_supports(config.head_dim)
    if config.attention == "flash" and not possible:
        raise UserError(
            f"attention flash runs on TPU, with head_dim a multiple of 8 up to 256, not on {platform} with head_dim "
            f"{config.head_dim}: set attention autoselected or dot_product."
        )
    return possible and config.attention != "dot_product"


def compute_dtype(spec: ThinkerSpec) -> jnp.dtype:
    """The JAX dtype of `spec.dtype`."""
    return jnp.dtype(spec.dtype)


def _halved_three_times(size: int) -> int:
    for _ in range(3):
        size = (size - 1) // 2 + 1
    return size
