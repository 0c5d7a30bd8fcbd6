"""On the published models' own shapes, every large weight is cut by every mesh axis that is there to cut weights."""

import math
from dataclasses import replace

import pytest
from far_devices import far_mesh

from audio_grpo.config import load_config
from audio_grpo.errors import UserError
from audio_grpo.model.lora import lora_table
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import sharding_of
from audio_grpo.model.thinker import thinker_table

BYTES = 2  # bfloat16
LARGE = 64 << 20
OMNI, ASR = "qwen3-omni-30b-a3b", ("qwen3-asr-0.6b", "qwen3-asr-1.7b")
MAPS = ["model.*.self_attn.*_proj", "*.mlp.gate", "lm_head", "audio_tower.*_proj", "*.fc*", "*.conv_out", "*.proj*"]
MESHES = {
    "expert 4": {"expert": 4},
    "fsdp 4": {"fsdp": 4},
    "fsdp 32": {"fsdp": 32},
    "fsdp 2 x expert 16": {"fsdp": 2, "expert": 16},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "fsdp 4 x expert 4 x tensor 2": {"fsdp": 4, "expert": 4, "tensor": 2},
    "data 4 x fsdp 2 x expert 4": {"data": 4, "fsdp": 2, "expert": 4},
}


def table_of(model):
    return thinker_table(thinker_spec(load_config(model)))


def left_whole(mesh, table):
    """Large weights that some axis other than data does not cut, so that devices hold the same part of them."""
    cutting = mesh.size // mesh.shape["data"]

    def repeated(key, weight):
        shard = sharding_of(mesh, key, weight).shard_shape(weight.shape)
        return math.prod(shard) * cutting > weight.size

    return {key for key, weight in table.items() if repeated(key, weight) and weight.size * BYTES > LARGE}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", [OMNI, *ASR])
def test_no_large_weight_is_repeated(model, mesh):
    table = table_of(model)
    assert left_whole(far_mesh(**MESHES[mesh]), table) == set()


@pytest.mark.parametrize("model", [OMNI, "qwen3-asr-1.7b"])
def test_no_large_weight_is_repeated_over_four_tensor_parts(model):
    assert left_whole(far_mesh(tensor=4), table_of(model)) == set()


@pytest.mark.parametrize("mesh", MESHES)
def test_adapters_of_all_maps_divide_too(mesh):
    table = lora_table(table_of(OMNI), rank=64, targets=MAPS)
    assert left_whole(far_mesh(**MESHES[mesh]), table) == set()


def test_adapters_of_experts_are_cut_with_their_experts():
    table = lora_table(table_of(OMNI), rank=64, targets=["*.experts.*_proj"])
    assert sum(weight.size for weight in table.values()) == 48 * 128 * 3 * 64 * (2048 + 768)
    assert left_whole(far_mesh(expert=4), table) == set()


@pytest.mark.parametrize(
    ("broken", "meshes"),
    [
        ("lm_head.weight", list(MESHES)),
        ("model.layers.*.mlp.experts.*.down_proj.weight", list(MESHES)),
        ("audio_tower.layers.*.fc1.weight", list(MESHES)),
    ],
)
def test_a_weight_that_lost_its_axes_is_found(broken, meshes):
    table = table_of(OMNI)
    table[broken] = replace(table[broken], axes=tuple(None for _ in table[broken].axes))
    for mesh in meshes:
        assert left_whole(far_mesh(**MESHES[mesh]), table) == {broken}


def test_a_weight_that_lost_one_of_its_axes_is_found():
    table = table_of(OMNI)
    key = "model.layers.*.self_attn.q_proj.weight"
    table[key] = replace(table[key], axes=("layers", "heads", None))
    assert left_whole(far_mesh(fsdp=4, tensor=2), table) == {key}
    assert left_whole(far_mesh(tensor=4), table) == set()


@pytest.mark.parametrize(
    ("model", "sizes", "told"),
    [
        (OMNI, {"tensor": 8}, r"^audio_tower\..*: 20 audio_heads .* 8 equal parts .* 8 devices the nearest are 4: "),
        (OMNI, {"fsdp": 4, "tensor": 3}, "20 audio_heads .* 3 equal parts .* 12 devices the nearest are 2 and 4: "),
        ("qwen3-asr-0.6b", {"tensor": 4}, "14 audio_heads .* 4 equal parts .* 4 devices the nearest are 2: "),
        ("qwen3-asr-1.7b", {"tensor": 16}, "8 kv_heads .* 16 equal parts .* 16 devices the nearest are 8: "),
        ("qwen3-asr-1.7b", {"fsdp": 256}, r"^model\.embed_tokens\.weight: 151936 vocab .* the nearest are 128: "),
    ],
)
def test_meshes_that_the_models_sizes_do_not_allow_are_refused(model, sizes, told):
    with pytest.raises(UserError, match=told):
        left_whole(far_mesh(**sizes), table_of(model))
