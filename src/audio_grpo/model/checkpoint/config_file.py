"""What a published config.json says of a model, as configuration keys."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from audio_grpo.config import DecoderBlock
from audio_grpo.errors import UserError
from audio_grpo.model.checkpoint.folder import read_json

_FAMILIES: Mapping[str, DecoderBlock] = {
    "qwen3_omni_moe": "qwen3_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni",
    "qwen3_asr": "qwen3_asr",
}

Layers = Annotated[int, Field(gt=0, le=1000)]
Size = Annotated[int, Field(gt=0, le=2**20)]
Count = Annotated[int, Field(ge=0, le=2**20)]
Theta = Annotated[float, Field(gt=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """The model in a published checkpoint."""

    settings: Mapping[str, Any]
    """Configuration keys that describe it, e.g. {"decoder_block": "qwen3_asr", "emb_dim": 1024, ...}."""
    audio_pad: int | None
    """Token id of the audio placeholder, where config.json states it."""


class _Section(BaseModel):
    """Keys of config.json that matter here; all others are passed over. A key without a default is required."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class _Rope(_Section):
    rope_theta: Theta | None = None
    rope_type: Literal["default", "mrope"] = "default"
    type: Literal["default", "mrope"] = "default"
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    mrope_section: list[Count] | None = None


class _Text(_Section):
    num_hidden_layers: Layers
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size | None = None
    intermediate_size: Size
    vocab_size: Size
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    use_sliding_window: Literal[False] | None = None
    sliding_window: int | None = None
    layer_types: list[Literal["full_attention"]] | None = None
    rope_theta: Theta | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    tie_word_embeddings: bool | None = None

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def ropes(self) -> list[_Rope]:
        return [rope for rope in (self.rope_scaling, self.rope_parameters) if rope is not None]

    @property
    def thetas(self) -> set[float]:
        given = [self.rope_theta, *(rope.rope_theta for rope in self.ropes)]
        return {theta for theta in given if theta is not None}


class _ExpertText(_Text):
    num_experts: Count
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    norm_topk_prob: bool
    mlp_only_layers: list[Count] | None = None
    decoder_sparse_step: Literal[1] = 1
    shared_expert_intermediate_size: Literal[0] = 0

    @property
    def dense(self) -> bool:
        return self.num_experts == 0 or set(self.mlp_only_layers or []) == set(range(self.num_hidden_layers))


class _Audio(_Section):
    d_model: Size
    encoder_layers: Layers
    encoder_attention_heads: Size
    encoder_ffn_dim: Size
    downsample_hidden_size: Size
    output_dim: Size
    num_mel_bins: Size
    n_window: Size
    n_window_infer: Size
    activation_function: Literal["gelu"] = "gelu"
    scale_embedding: Literal[False] = False


class _Thinker(_Section):
    audio_config: _Audio
    tie_word_embeddings: bool | None = None
    audio_token_id: Count | None = None


class _OmniThinker(_Thinker):
    text_config: _ExpertText


class _AsrThinker(_Thinker):
    text_config: _Text


def spec_from_published(folder: Path) -> PublishedModel:
    """Read a checkpoint's config.json: whole Omni models and bare thinkers, Qwen3-ASR in both of its layouts.

    Raises:
        UserError: a key is missing, absurd, or asks for something that the model here does not do; lists all keys.
    """
    path = folder / "config.json"
    raw = read_json(path)
    family = _FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise UserError(
            f"{path} has model_type {raw.get('model_type')!r}; the model types that can be read are "
            f"{', '.join(_FAMILIES)}."
        )
    section = "thinker_config." if "thinker_config" in raw else ""
    schema = _OmniThinker if family == "qwen3_omni" else _AsrThinker
    try:
        thinker = schema.model_validate(raw["thinker_config"] if section else raw)
    except ValidationError as error:
        faults = [f"{section}{'.'.join(map(str, x['loc']))} {_given(x)}: {x['msg']}" for x in error.errors()]
        raise _unusable(path, faults) from error
    contradictions = [section + sentence for sentence in _contradictions(thinker)]
    if contradictions:
        raise _unusable(path, contradictions)
    return PublishedModel(settings=_settings(family, thinker), audio_pad=thinker.audio_token_id)


def _given(error: Mapping[str, Any]) -> str:
    return "is missing" if error["type"] == "missing" else f"is {str(error['input'])[:80]}"


def _unusable(path: Path, faults: list[str]) -> UserError:
    return UserError(f"{path} does not describe a model that can be read here: {'; '.join(faults)}.")


def _contradictions(thinker: _OmniThinker | _AsrThinker) -> Iterator[str]:
    text, audio = thinker.text_config, thinker.audio_config
    if text.num_attention_heads % text.num_key_value_heads:
        yield (
            f"text_config.num_attention_heads {text.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{text.num_key_value_heads}"
        )
    if text.sliding_window is not None and text.use_sliding_window is None:
        yield f"text_config.sliding_window {text.sliding_window} asks for attention that is not supported; write null"
    if text.head_width % 2:
        yield f"text_config.head_dim {text.head_width} is odd"
    for rope in text.ropes:
        # Positions of text and audio are the same on all three axes, so the sections only have to add up.
        if rope.mrope_section is not None and 2 * sum(rope.mrope_section) != text.head_width:
            yield f"text_config's mrope_section {rope.mrope_section} is not half of head_dim {text.head_width} in sum"
    if len(text.thetas) != 1:
        yield (
            f"text_config gives {sorted(text.thetas) or 'no value'} for rope_theta; write one, either beside "
            "rope_scaling or in rope_parameters"
        )
    if isinstance(text, _ExpertText) and not text.dense:
        if text.mlp_only_layers:
            yield f"text_config.mlp_only_layers {text.mlp_only_layers} must be empty or name every layer"
        if text.num_experts_per_tok > text.num_experts:
            yield f"text_config.num_experts_per_tok {text.num_experts_per_tok} exceeds num_experts {text.num_experts}"
    if audio.d_model % (2 * audio.encoder_attention_heads):
        yield (
            f"audio_config.d_model {audio.d_model} does not divide into {audio.encoder_attention_heads} "
            "encoder_attention_heads of even width"
        )
    if audio.output_dim != text.hidden_size:
        yield f"audio_config.output_dim {audio.output_dim} is not text_config.hidden_size {text.hidden_size}"
    if audio.n_window_infer % (2 * audio.n_window):
        yield f"audio_config.n_window_infer {audio.n_window_infer} is not a multiple of twice n_window {audio.n_window}"


def _settings(family: DecoderBlock, thinker: _OmniThinker | _AsrThinker) -> dict[str, Any]:
    text, audio = thinker.text_config, thinker.audio_config
    ties = [tie for tie in (thinker.tie_word_embeddings, text.tie_word_embeddings) if tie is not None]
    settings = {
        "decoder_block": family,
        "num_decoder_layers": text.num_hidden_layers,
        "emb_dim": text.hidden_size,
        "num_query_heads": text.num_attention_heads,
        "num_kv_heads": text.num_key_value_heads,
        "head_dim": text.head_width,
        "mlp_dim": text.intermediate_size,
        "num_experts": 0,
        "vocab_size": text.vocab_size,
        "logits_via_embedding": ties[0] if ties else family == "qwen3_asr",
        "rope_max_timescale": float(*text.thetas),
        "normalization_layer_epsilon": text.rms_norm_eps,
        "d_model_for_audio": audio.d_model,
        "encoder_layers_for_audio": audio.encoder_layers,
        "encoder_attention_heads_for_audio": audio.encoder_attention_heads,
        "encoder_ffn_dim_for_audio": audio.encoder_ffn_dim,
        "downsample_hidden_size_for_audio": audio.downsample_hidden_size,
        "output_dim_for_audio": audio.output_dim,
        "num_mel_bins_for_audio": audio.num_mel_bins,
        "n_window_for_audio": audio.n_window,
        "n_window_infer_for_audio": audio.n_window_infer,
    }
    if isinstance(text, _ExpertText) and not text.dense:
        settings |= {
            "num_experts": text.num_experts,
            "num_experts_per_tok": text.num_experts_per_tok,
            "moe_mlp_dim": text.moe_intermediate_size,
            "norm_topk_prob": text.norm_topk_prob,
        }
    return settings
