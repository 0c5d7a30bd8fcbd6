import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from audio_grpo.errors import UserError
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.thinker import thinker_table
from audio_grpo.parallel.mesh import (
    WEIGHT_RULES,
    batch_sharding,
    batch_shards,
    create_mesh,
    replicated,
    weight_sharding,
)
from small_model import small_config

AXES = ("data", "fsdp", "expert", "tensor")


def mesh_of(devices=4, **sizes):
    keys = {f"ici_{axis}_parallelism": sizes.get(axis, 1) for axis in AXES}
    return create_mesh(small_config(**keys), jax.devices()[:devices])


def specs_of(mesh, **changes):
    table = thinker_table(thinker_spec(small_config(**changes)))
    return {key: weight_sharding(mesh, key, weight.shape, weight.axes).spec for key, weight in table.items()}


@pytest.mark.parametrize("axis", AXES)
def test_minus_one_takes_the_devices_that_the_others_leave(axis):
    other = "data" if axis == "tensor" else "tensor"
    assert mesh_of(**{axis: -1}).shape == dict.fromkeys(AXES, 1) | {axis: 4}
    assert mesh_of(**{axis: -1, other: 2}).shape == dict.fromkeys(AXES, 1) | {axis: 2, other: 2}


def test_all_devices_are_used_by_default():
    assert create_mesh(small_config()).shape == dict.fromkeys(AXES, 1) | {"fsdp": 4}


def test_devices_lie_in_the_order_of_the_axes():
    mesh = mesh_of(data=2, tensor=2)
    assert mesh.axis_names == AXES
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids[:, 0, 0, :], [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"fsdp": 2, "tensor": 1}, "ici_fsdp_parallelism 2 x ici_expert_parallelism 1 x ici_tensor_parallelism 1"),
        ({"fsdp": 4, "tensor": 2}, "ici_fsdp_parallelism 4 x ici_expert_parallelism 1 x ici_tensor_parallelism 2"),
        ({"fsdp": -1, "tensor": 3}, "ici_fsdp_parallelism -1 x ici_expert_parallelism 1 x ici_tensor_parallelism 3"),
        ({"fsdp": -1, "tensor": 8}, "ici_tensor_parallelism 8"),
        ({"fsdp": 4, "tensor": 0}, "ici_tensor_parallelism 0"),
    ],
)
def test_a_product_other_than_the_devices_is_refused_with_its_numbers(sizes, told):
    with pytest.raises(UserError, match="does not use exactly the 4 devices present: make the product 4") as refusal:
        mesh_of(**sizes)
    assert told in str(refusal.value)


def test_weights_lie_where_the_rules_say():
    specs = specs_of(mesh_of(fsdp=2, tensor=2))
    expected = {
        "model.embed_tokens.weight": ("tensor", "fsdp"),
        "lm_head.weight": ("tensor", "fsdp"),
        "model.norm.weight": (None,),
        "model.layers.*.self_attn.q_proj.weight": (None, "tensor", "fsdp"),
        "model.layers.*.self_attn.k_proj.weight": (None, "tensor", "fsdp"),
        "model.layers.*.self_attn.o_proj.weight": (None, "fsdp", "tensor"),
        "model.layers.*.mlp.up_proj.weight": (None, "tensor", "fsdp"),
        "model.layers.*.mlp.down_proj.weight": (None, "fsdp", "tensor"),
        "model.layers.*.input_layernorm.weight": (None, None),
        "audio_tower.layers.*.self_attn.q_proj.weight": (None, "tensor", "fsdp"),
        "audio_tower.layers.*.fc2.weight": (None, "fsdp", "tensor"),
        "audio_tower.conv2d1.weight": (None, None, None, None),
    }
    assert {key: specs[key] for key in expected} == {key: PartitionSpec(*spec) for key, spec in expected.items()}


def test_experts_are_shared_out_over_their_axis():
    specs = specs_of(mesh_of(expert=4), num_experts=4)
    assert specs["model.layers.*.mlp.experts.*.up_proj.weight"] == PartitionSpec(None, "expert", None, None)
    assert specs["model.layers.*.mlp.gate.weight"] == PartitionSpec(None, None, None)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 4}, {"expert": 4}])
def test_every_weight_is_cut_by_just_the_axes_that_its_rules_name(sizes):
    mesh = mesh_of(**sizes)
    table = thinker_table(thinker_spec(small_config(num_experts=4)))
    for key, weight in table.items():
        sharding = weight_sharding(mesh, key, weight.shape, weight.axes)
        parts = [mesh.shape[WEIGHT_RULES[axis]] if axis and WEIGHT_RULES[axis] else 1 for axis in weight.axes]
        expected = tuple(size // part for size, part in zip(weight.shape, parts, strict=True))
        assert sharding.shard_shape(weight.shape) == expected, key


def test_a_dimension_that_does_not_divide_is_refused_with_the_sizes_that_work():
    mesh = mesh_of(tensor=4)
    with pytest.raises(
        UserError,
        match=r"^lm_head\.weight: dimension vocab of size 30 does not divide over ici_tensor_parallelism 4; "
        r"sizes that work: \[1, 2, 3, 5, 6\]\.$",
    ):
        weight_sharding(mesh, "lm_head.weight", (30, 8), ("vocab", "embed"))


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [({"fsdp": 4}, 4), ({"tensor": 4}, 1), ({"data": 2, "expert": 2}, 4), ({"fsdp": -1, "tensor": 2}, 2)],
)
def test_a_batch_is_split_over_all_axes_but_tensor(sizes, shards):
    mesh = mesh_of(**sizes)
    assert batch_shards(mesh) == shards
    assert batch_sharding(mesh).shard_shape((8, 5)) == (8 // shards, 5)
    assert replicated(mesh).shard_shape((8, 5)) == (8, 5)
