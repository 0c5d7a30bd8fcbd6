"""From the presets alone: the published names, shapes and counts."""

import math
from functools import cache

import pytest

from audio_grpo.config import load_config
from audio_grpo.model.checkpoint import PUBLISHED_VISION, published_table
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import parameter_count, published_names

PRESETS = {
    "qwen3-omni-30b-a3b": (18_867, 525, 351, 31_719_205_488),
    "qwen3-asr-0.6b": (311, 301, 0, 938_008_576),
    "qwen3-asr-1.7b": (311, 397, 0, 2_349_217_408),
}
"""Tensors of the text model, the audio tower and the vision tower, and parameters of all."""


@cache
def published_shapes(preset: str) -> dict[str, tuple[int, ...]]:
    config = load_config(preset)
    vision = PUBLISHED_VISION if config.decoder_block == "qwen3_omni" else None
    table = published_table(thinker_spec(config), vision)
    shapes = {
        name: weight.shape[key.count("*") :]
        for key, weight in table.items()
        for name, _ in published_names(key, weight)
    }
    assert parameter_count(table) == sum(map(math.prod, shapes.values()))
    return shapes


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_count_the_published_tensors_and_parameters(preset: str) -> None:
    shapes = published_shapes(preset)
    audio = sum(name.startswith("audio_tower.") for name in shapes)
    vision = sum(name.startswith("visual.") for name in shapes)
    parameters = sum(map(math.prod, shapes.values()))
    assert (len(shapes) - audio - vision, audio, vision, parameters) == PRESETS[preset]


def test_omni_parts_have_the_published_parameters() -> None:
    shapes = published_shapes("qwen3-omni-30b-a3b")

    def parameters(part: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if part in name)

    assert parameters("audio_tower.") == 647_927_168
    assert parameters("visual.") == 538_631_408
    assert parameters(".mlp.experts.") == 28_991_029_248
    assert parameters("model.") + parameters("lm_head.") == 30_532_646_912


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (152064, 2048)),
        ("lm_head.weight", (152064, 2048)),
        ("model.norm.weight", (2048,)),
        ("model.layers.47.input_layernorm.weight", (2048,)),
        ("model.layers.0.self_attn.q_proj.weight", (4096, 2048)),
        ("model.layers.0.self_attn.k_proj.weight", (512, 2048)),
        ("model.layers.0.self_attn.o_proj.weight", (2048, 4096)),
        ("model.layers.0.self_attn.k_norm.weight", (128,)),
        ("model.layers.0.mlp.gate.weight", (128, 2048)),
        ("model.layers.47.mlp.experts.127.gate_proj.weight", (768, 2048)),
        ("model.layers.47.mlp.experts.127.down_proj.weight", (2048, 768)),
        ("audio_tower.conv2d1.weight", (480, 1, 3, 3)),
        ("audio_tower.conv2d3.weight", (480, 480, 3, 3)),
        ("audio_tower.conv_out.weight", (1280, 7680)),
        ("audio_tower.layers.31.self_attn.out_proj.bias", (1280,)),
        ("audio_tower.layers.31.fc2.weight", (1280, 5120)),
        ("audio_tower.proj2.weight", (2048, 1280)),
        ("visual.patch_embed.proj.weight", (1152, 3, 2, 16, 16)),
        ("visual.pos_embed.weight", (2304, 1152)),
        ("visual.blocks.26.attn.qkv.bias", (3456,)),
        ("visual.merger.ln_q.weight", (1152,)),
        ("visual.merger_list.2.ln_q.weight", (4608,)),
        ("visual.merger_list.2.mlp.2.weight", (2048, 4608)),
    ],
)
def test_omni_tensors_have_the_published_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert published_shapes("qwen3-omni-30b-a3b")[name] == shape
