"""The config.json of a model that did not come from a published checkpoint."""

from typing import Any

from audio_grpo.config import DecoderBlock
from audio_grpo.model.checkpoint.vision import VisionSpec
from audio_grpo.model.spec import AudioTowerSpec, DecoderSpec, ThinkerSpec
from audio_grpo.types import SpecialTokens

_MAX_POSITIONS = 65536
_VISION_TOKENS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
"""Qwen3-Omni's; no prompt here has them, but the published software looks for them."""


def published_config(
    spec: ThinkerSpec, family: DecoderBlock, special: SpecialTokens, vision: VisionSpec | None, dtype: str
) -> dict[str, Any]:
    """config.json of a thinker in its family's original layout.

    Args:
        spec: the model's sizes.
        family: which published model it is a variant of.
        special: ids that prompts are made of.
        vision: the vision tower beside it, which only Qwen3-Omni has.
        dtype: the stored weights', "float32" or "bfloat16".
    """
    name = "Qwen3OmniMoe" if family == "qwen3_omni" else "Qwen3ASR"
    model_type = "qwen3_omni_moe" if family == "qwen3_omni" else "qwen3_asr"
    thinker = {
        "model_type": f"{model_type}_thinker",
        "text_config": _text_config(spec.decoder, family, special),
        "audio_config": _audio_config(spec.audio, model_type),
        "audio_token_id": special.audio_pad,
        "audio_start_token_id": special.audio_start,
        "audio_end_token_id": special.audio_end,
        "tie_word_embeddings": spec.decoder.tied,
        "dtype": dtype,
    }
    if vision is not None:
        thinker |= _VISION_TOKENS | {"vision_config": _vision_config(vision, model_type)}
    config = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": model_type,
        "thinker_config": thinker,
        "dtype": dtype,
    }
    return config | ({"enable_audio_output": False} if family == "qwen3_omni" else {})


def _text_config(spec: DecoderSpec, family: DecoderBlock, special: SpecialTokens) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": "qwen3_omni_moe_text" if family == "qwen3_omni" else "qwen3",
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.width,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_width,
        "intermediate_size": spec.mlp_width,
        "vocab_size": spec.vocab,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "max_position_embeddings": _MAX_POSITIONS,
        "rope_theta": spec.rope_theta,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": _mrope_sections(spec.head_width // 2),
            "mrope_interleaved": True,
        },
        "pad_token_id": special.pad,
        "eos_token_id": list(special.stop),
    }
    if family == "qwen3_omni":
        config |= {
            "num_experts": spec.experts,
            "num_experts_per_tok": spec.experts_per_token,
            "moe_intermediate_size": spec.expert_width,
            "norm_topk_prob": spec.norm_topk,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def _mrope_sections(half: int) -> list[int]:
    """Time, height, width in the published proportion: 24, 20, 20 of 64."""
    side = 20 * half // 64
    return [half - 2 * side, side, side]


def _audio_config(spec: AudioTowerSpec, model_type: str) -> dict[str, Any]:
    return {
        "model_type": f"{model_type}_audio_encoder",
        "d_model": spec.width,
        "encoder_layers": spec.layers,
        "encoder_attention_heads": spec.heads,
        "encoder_ffn_dim": spec.ffn,
        "downsample_hidden_size": spec.channels,
        "output_dim": spec.output,
        "num_mel_bins": spec.mel_bins,
        "n_window": spec.chunk_frames // 2,
        "n_window_infer": spec.window_frames,
        "conv_chunksize": 500,
        "max_source_positions": 1500,
        "activation_function": "gelu",
        "scale_embedding": False,
    }


def _vision_config(spec: VisionSpec, model_type: str) -> dict[str, Any]:
    return {
        "model_type": f"{model_type}_vision_encoder",
        "depth": spec.layers,
        "hidden_size": spec.width,
        "num_heads": spec.heads,
        "intermediate_size": spec.ffn,
        "out_hidden_size": spec.output,
        "patch_size": spec.patch,
        "temporal_patch_size": spec.frames,
        "spatial_merge_size": spec.merge,
        "num_position_embeddings": spec.positions,
        "deepstack_visual_indexes": list(spec.deepstack),
        "in_channels": 3,
    }
