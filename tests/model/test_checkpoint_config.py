"""config.json as it is published, in every layout, comes out as the presets."""

import json
from pathlib import Path
from typing import Any

import pytest

from audio_grpo.config import Config, load_config
from audio_grpo.errors import UserError
from audio_grpo.model.checkpoint import PublishedModel, spec_from_published
from audio_grpo.model.spec import thinker_spec

Json = dict[str, Any]

MROPE = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
OMNI_TEXT: Json = {
    "model_type": "qwen3_omni_moe_text",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 768,
    "max_position_embeddings": 65536,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**MROPE, "type": "default", "interleaved": True},
    "rope_theta": 1000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
OMNI_AUDIO: Json = {
    "model_type": "qwen3_omni_moe_audio_encoder",
    "activation_function": "gelu",
    "conv_chunksize": 500,
    "d_model": 1280,
    "downsample_hidden_size": 480,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "max_source_positions": 1500,
    "n_window": 50,
    "n_window_infer": 800,
    "num_mel_bins": 128,
    "output_dim": 2048,
    "scale_embedding": False,
}
ASR_TEXT: Json = {
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
ASR_AUDIO: Json = {
    **OMNI_AUDIO,
    "d_model": 896,
    "encoder_attention_heads": 14,
    "encoder_ffn_dim": 3584,
    "encoder_layers": 18,
    "output_dim": 1024,
}
OMNI_THINKER: Json = {"text_config": OMNI_TEXT, "audio_config": OMNI_AUDIO, "audio_token_id": 151675}
ASR_ORIGINAL: Json = {
    "text_config": {**ASR_TEXT, "rope_theta": 1000000, "rope_scaling": MROPE},
    "audio_config": ASR_AUDIO,
    "audio_token_id": 151676,
}
ASR_CONVERTED: Json = {
    "text_config": {**ASR_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "audio_config": ASR_AUDIO,
    "audio_token_id": 151676,
    "tie_word_embeddings": True,
}


def described(config: Json, folder: Path) -> PublishedModel:
    (folder / "config.json").write_text(json.dumps(config))
    return spec_from_published(folder)


@pytest.mark.parametrize(
    ("config", "preset", "audio_pad"),
    [
        ({"model_type": "qwen3_omni_moe", "thinker_config": OMNI_THINKER}, "qwen3-omni-30b-a3b", 151675),
        ({"model_type": "qwen3_omni_moe_thinker", **OMNI_THINKER}, "qwen3-omni-30b-a3b", 151675),
        ({"model_type": "qwen3_asr", "thinker_config": ASR_ORIGINAL}, "qwen3-asr-0.6b", 151676),
        ({"model_type": "qwen3_asr", **ASR_CONVERTED}, "qwen3-asr-0.6b", 151676),
    ],
    ids=["whole Omni", "Omni thinker", "original ASR", "converted ASR"],
)
def test_published_layouts_describe_the_presets(config: Json, preset: str, audio_pad: int, tmp_path: Path) -> None:
    model, expected = described(config, tmp_path), load_config(preset)
    settings = {**expected.model_dump(), **model.settings}
    assert model.settings["decoder_block"] == expected.decoder_block
    assert thinker_spec(Config.model_validate(settings)).audio == thinker_spec(expected).audio
    decoder, of_preset = thinker_spec(Config.model_validate(settings)).decoder, thinker_spec(expected).decoder
    assert {field: getattr(decoder, field) for field in decoder.__slots__ if field != "mlp_width"} == {
        field: getattr(of_preset, field) for field in decoder.__slots__ if field != "mlp_width"
    }
    assert model.audio_pad == audio_pad


def test_layers_without_experts_are_a_dense_decoder(tmp_path: Path) -> None:
    text = {**OMNI_TEXT, "mlp_only_layers": list(range(48))}
    model = described({"model_type": "qwen3_omni_moe_thinker", **OMNI_THINKER, "text_config": text}, tmp_path)
    assert model.settings["num_experts"] == 0


@pytest.mark.parametrize(("outer", "inner", "tied"), [(True, False, True), (None, True, True), (None, None, True)])
def test_the_level_of_the_head_says_whether_it_is_tied(
    outer: bool | None, inner: bool | None, tied: bool, tmp_path: Path
) -> None:
    text = {**ASR_CONVERTED["text_config"], "tie_word_embeddings": inner}
    config = {"model_type": "qwen3_asr", **ASR_CONVERTED, "text_config": text, "tie_word_embeddings": outer}
    assert described(config, tmp_path).settings["logits_via_embedding"] is tied


def test_a_sliding_window_is_refused_unless_it_is_off(tmp_path: Path) -> None:
    text = {**ASR_CONVERTED["text_config"], "sliding_window": 4096}
    config = {"model_type": "qwen3_asr", **ASR_CONVERTED, "text_config": text}
    with pytest.raises(UserError, match="sliding_window 4096"):
        described(config, tmp_path)
    text["use_sliding_window"] = False
    assert described(config, tmp_path).settings["num_decoder_layers"] == 28


def test_all_faults_of_a_config_are_told_together(tmp_path: Path) -> None:
    text = {**OMNI_TEXT, "hidden_act": "relu", "num_hidden_layers": -4}
    with pytest.raises(UserError) as caught:
        described({"model_type": "qwen3_omni_moe", "thinker_config": {**OMNI_THINKER, "text_config": text}}, tmp_path)
    assert "thinker_config.text_config.hidden_act is relu" in str(caught.value)
    assert "thinker_config.text_config.num_hidden_layers is -4" in str(caught.value)
