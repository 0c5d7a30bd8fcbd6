import math

import jax
import numpy as np
import pytest
from far_devices import far_devices, far_mesh
from jax.sharding import PartitionSpec

from audio_grpo.errors import UserError
from audio_grpo.model.lora import lora_table
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import sharding_of
from audio_grpo.model.thinker import thinker_table
from audio_grpo.parallel import mesh as mesh_module
from audio_grpo.parallel.mesh import batch_sharding, batch_shards, create_mesh, replicated, weight_sharding
from small_model import small_config

AXES = ("data", "fsdp", "expert", "tensor")


def mesh_of(devices=4, **sizes):
    keys = {f"ici_{axis}_parallelism": sizes.get(axis, 1) for axis in AXES}
    return create_mesh(small_config(**keys), jax.devices()[:devices])


def specs_of(mesh, **changes):
    table = thinker_table(thinker_spec(small_config(**changes)))
    return {key: sharding_of(mesh, key, weight).spec for key, weight in table.items()}


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


def ids_of(config, devices):
    mesh = create_mesh(config, devices)
    return mesh.shape, np.vectorize(lambda device: device.id)(mesh.devices)


def test_slices_repeat_the_weights_by_default():
    shape, ids = ids_of(small_config(), far_devices(8, slice_index=4))
    assert shape == {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}
    np.testing.assert_array_equal(ids[:, :, 0, 0], [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_an_axis_may_span_slices_and_devices_of_one():
    keys = {
        "dcn_data_parallelism": 1,
        "dcn_fsdp_parallelism": 2,
        "ici_fsdp_parallelism": 2,
        "ici_expert_parallelism": 2,
    }
    shape, ids = ids_of(small_config(**keys), far_devices(8, slice_index=4))
    assert shape == {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1}
    np.testing.assert_array_equal(ids[0, :, :, 0], [[0, 1], [2, 3], [4, 5], [6, 7]])


def test_processes_are_slices_where_the_keys_ask_for_some():
    devices = far_devices(8, process_index=4)
    assert create_mesh(small_config(), devices).shape["fsdp"] == 8
    keys = {"dcn_data_parallelism": 1, "dcn_tensor_parallelism": 2}
    shape, ids = ids_of(small_config(**keys), devices)
    assert shape == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 2}
    np.testing.assert_array_equal(ids[0, :, 0, :], [[0, 4], [1, 5], [2, 6], [3, 7]])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"dcn_data_parallelism": 3},
            r"^dcn_data_parallelism 3 x .* does not use exactly the 2 slices present: make the product 2, or set one",
        ),
        ({"dcn_data_parallelism": 1}, "does not use exactly the 2 slices present"),
        ({"ici_fsdp_parallelism": 8}, "does not use exactly the 4 devices of a slice present: make the product 4"),
    ],
)
def test_slices_that_do_not_fit_are_refused_with_their_numbers(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        create_mesh(small_config(**keys), far_devices(8, slice_index=4))


def test_slices_in_a_single_process_without_any_are_refused():
    with pytest.raises(UserError, match="dcn_tensor_parallelism 2 does not use exactly the 1 slices present"):
        create_mesh(small_config(dcn_tensor_parallelism=2))


def test_weights_lie_where_the_rules_say():
    specs = specs_of(mesh_of(fsdp=2, tensor=2))
    expected = {
        "model.embed_tokens.weight": (("tensor", "fsdp"), None),
        "lm_head.weight": (("tensor", "fsdp"), None),
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


def test_experts_are_shared_out_over_their_axis_and_all_else_is_cut_by_it():
    specs = specs_of(far_mesh(fsdp=2, expert=4), num_experts=4)
    assert specs["model.layers.*.mlp.experts.*.up_proj.weight"] == PartitionSpec(None, "expert", None, "fsdp")
    assert specs["model.layers.*.mlp.experts.*.down_proj.weight"] == PartitionSpec(None, "expert", "fsdp", None)
    assert specs["model.layers.*.mlp.gate.weight"] == PartitionSpec(None, None, ("fsdp", "expert"))
    assert specs["model.layers.*.self_attn.q_proj.weight"] == PartitionSpec(None, None, ("fsdp", "expert"))


def test_data_parallelism_repeats_every_weight():
    assert all(not any(spec) for spec in specs_of(far_mesh(data=8), num_experts=4).values())


def tables():
    """Tables of every kind, by name."""
    kinds = {"dense": {}, "experts": {"num_experts": 4}, "tied": {"logits_via_embedding": True}}
    made = {name: thinker_table(thinker_spec(small_config(**changes))) for name, changes in kinds.items()}
    adapted = lora_table(made["dense"], rank=2, targets=["*_proj", "*.fc*", "*.conv_out", "*.proj*", "lm_head"])
    assert {"lm_head.lora_B.weight", "audio_tower.proj2.lora_A.weight"} < set(adapted)
    return made | {"adapters": adapted}


def test_every_rule_is_used_and_every_axis_has_one():
    named = {axis for table in tables().values() for weight in table.values() for axis in weight.axes if axis}
    assert named == set(mesh_module.WEIGHT_RULES)


def test_weights_of_every_kind_can_be_cut_by_all_axes_at_once():
    mesh = far_mesh(data=2, fsdp=2, expert=2, tensor=2)
    for table in tables().values():
        for key, weight in table.items():
            named = [name for axis in weight.axes if axis for name in mesh_module.WEIGHT_RULES[axis]]
            shard = sharding_of(mesh, key, weight).shard_shape(weight.shape)
            assert math.prod(weight.shape) == math.prod(shard) * 2 ** len(named), key


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="breadth"):
        weight_sharding(far_mesh(fsdp=2), "w", (4, 4), ("embed", "breadth"))


@pytest.mark.parametrize("used", [True, False])
def test_two_dimensions_that_want_one_mesh_axis_are_refused_where_it_is_used(used):
    mesh = far_mesh(expert=2 if used else 1, tensor=2)
    weight = ("w", (4, 6, 8), ("expert", "mlp", "embed"))
    if used:
        with pytest.raises(UserError, match=r"^w: dimensions expert and embed both want the mesh axis expert: give"):
            weight_sharding(mesh, *weight)
    else:
        assert weight_sharding(mesh, *weight).spec == PartitionSpec(None, "tensor", None)


@pytest.mark.parametrize(
    ("shape", "axes", "unit", "mesh", "told"),
    [
        ((1280, 64), ("audio_heads", None), 64, {"tensor": 8}, "20 audio_heads can not be cut into 8 equal parts .*4:"),
        ((1280, 64), ("audio_heads", None), 64, {"fsdp": 4, "tensor": 3}, "20 audio_heads .* 3 .* 12 .* 2 and 4:"),
        ((512, 64), ("kv_heads", None), 128, {"fsdp": 4, "tensor": 8}, "4 kv_heads .* 8 equal parts .* nearest are 4:"),
        (
            (30, 8),
            ("vocab", None),
            1,
            {"fsdp": 4, "expert": 3},
            r"30 vocab .* 12 equal parts \(fsdp 4 x expert 3\); .* nearest are 6: change "
            r"ici_fsdp_parallelism or ici_expert_parallelism \(or dcn",
        ),
        ((6, 8), ("expert", None), 1, {"expert": 4}, "6 expert can not .* 4 devices the nearest are 2: change ici_exp"),
    ],
    ids=["audio heads", "audio heads over 3", "KV heads", "vocabulary", "experts"],
)
def test_what_does_not_divide_is_refused_with_the_sizes_that_work(shape, axes, unit, mesh, told):
    with pytest.raises(UserError, match=rf"^w: {told}"):
        weight_sharding(far_mesh(**mesh), "w", shape, axes, unit=unit)


def test_heads_stay_whole():
    """Rows would divide, heads do not."""
    with pytest.raises(UserError, match="2 audio_heads can not be cut into 4 equal parts"):
        specs_of(mesh_of(tensor=4))


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [({"fsdp": 4}, 4), ({"tensor": 4}, 1), ({"data": 2, "expert": 2}, 4), ({"fsdp": -1, "tensor": 2}, 2)],
)
def test_a_batch_is_split_over_all_axes_but_tensor(sizes, shards):
    mesh = mesh_of(**sizes)
    assert batch_shards(mesh) == shards
    assert batch_sharding(mesh).shard_shape((8, 5)) == (8 // shards, 5)
    assert replicated(mesh).shard_shape((8, 5)) == (8, 5)
