"""Every weight belongs to the part that its name says."""

import pytest

from audio_grpo.model.lora import lora_table
from audio_grpo.model.parts import by_part, part_of
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.thinker import thinker_table
from small_model import small_config


def table_of(**changes):
    table = thinker_table(thinker_spec(small_config(**changes)))
    return table | lora_table(table, rank=2, targets=["model.layers.*.self_attn.*_proj", "audio_tower.proj1"])


@pytest.mark.parametrize("experts", [0, 4])
def test_every_weight_has_one_part(experts):
    table = table_of(num_experts=experts, num_experts_per_tok=2, moe_mlp_dim=16)
    parts = by_part(table)
    assert sorted(key for keys in parts.values() for key in keys) == sorted(table)
    middle = {"router", "experts"} if experts else {"mlp"}
    assert parts.keys() == middle | {"lora", "projector", "audio_tower", "attention", "embeddings", "norms"}


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("audio_tower.proj1.weight", "projector"),
        ("audio_tower.conv_out.weight", "audio_tower"),
        ("audio_tower.layers.*.self_attn.q_proj.weight", "audio_tower"),
        ("model.layers.*.mlp.gate.weight", "router"),
        ("model.layers.*.mlp.gate_proj.weight", "mlp"),
        ("model.layers.*.mlp.experts.*.gate_proj.weight", "experts"),
        ("model.layers.*.self_attn.q_norm.weight", "attention"),
        ("model.layers.*.input_layernorm.weight", "norms"),
        ("model.norm.weight", "norms"),
        ("lm_head.weight", "embeddings"),
        ("model.layers.*.self_attn.q_proj.lora_B.weight", "lora"),
    ],
)
def test_a_name_tells_the_part(key, part):
    assert part_of(key) == part


def test_a_weight_of_no_part_is_refused():
    with pytest.raises(ValueError, match=r"The weight talker\.head\.weight belongs to no part of the model"):
        part_of("talker.head.weight")
