"""The model presets have the published models' exact sizes: their parameters add up to the published counts."""

import pytest

from audio_grpo.config import Config, load_config


def decoder_parameters(config: Config) -> int:
    width, head = config.emb_dim, config.head_dim
    attention = 2 * width * head * (config.num_query_heads + config.num_kv_heads) + 2 * head
    experts = config.num_experts * (3 * width * config.moe_mlp_dim + width)
    mlp = experts if config.num_experts else 3 * width * config.mlp_dim
    # The head is stored although it is tied.
    return config.num_decoder_layers * (attention + mlp + 2 * width) + width + 2 * config.vocab_size * width


def tower_parameters(config: Config) -> int:
    width, channels, out = (
        config.d_model_for_audio,
        config.downsample_hidden_size_for_audio,
        config.output_dim_for_audio,
    )
    assert width is not None
    assert channels is not None
    assert out is not None
    ffn, layers = config.encoder_ffn_dim_for_audio, config.encoder_layers_for_audio
    assert ffn is not None
    assert layers is not None
    convolutions = 9 * channels + channels + 2 * (9 * channels**2 + channels)
    front = convolutions + channels * (config.num_mel_bins_for_audio // 8) * width
    layer = 4 * (width**2 + width) + 2 * width * ffn + ffn + width + 4 * width
    return front + layers * layer + 2 * width + width**2 + width + width * out + out


@pytest.mark.parametrize(
    ("name", "tower", "total"),
    [
        ("qwen3-omni-30b-a3b", 647_927_168, 30_532_646_912 + 647_927_168),
        ("qwen3-asr-0.6b", None, 938_008_576),
        ("qwen3-asr-1.7b", None, 2_349_217_408),
    ],
)
def test_parameters_add_up_to_the_published_count(name: str, tower: int | None, total: int) -> None:
    config = load_config(name)
    assert tower is None or tower_parameters(config) == tower
    assert decoder_parameters(config) + tower_parameters(config) == total


@pytest.mark.parametrize("name", ["qwen3-omni-30b-a3b", "qwen3-asr-0.6b", "qwen3-asr-1.7b"])
def test_published_models_share_their_front_end_and_constants(name: str) -> None:
    config = load_config(name)
    heads = config.encoder_attention_heads_for_audio
    assert (config.n_window_for_audio, config.n_window_infer_for_audio) == (50, 800)
    assert (config.rope_max_timescale, config.normalization_layer_epsilon) == (1e6, 1e-6)
    assert heads is not None
    assert config.d_model_for_audio == 64 * heads


def test_the_asr_models_bring_their_own_prompt_and_tied_head() -> None:
    config = load_config("qwen3-asr-0.6b")
    assert (config.decoder_block, config.template, config.logits_via_embedding) == ("qwen3_asr", "qwen3-asr", True)
