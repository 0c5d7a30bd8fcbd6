import jax
import jax.numpy as jnp
import pytest

from audio_grpo.parallel.activations import FEW_TOKENS, MANY_TOKENS, Placement
from audio_grpo.parallel.mesh import MESH_AXES, create_mesh, single_device_mesh
from small_model import small_config

FEW_AND_MANY = pytest.mark.parametrize("rules", [FEW_TOKENS, MANY_TOKENS], ids=["few", "many"])


@pytest.fixture
def mesh():
    return create_mesh(small_config(ici_fsdp_parallelism=2, ici_tensor_parallelism=2), jax.devices()[:4])


@FEW_AND_MANY
def test_rules_name_axes_of_the_mesh(rules):
    assert {axis for axes in rules.values() for axis in axes} == set(MESH_AXES)


def test_model_functions_may_use_any_rules_that_both_layouts_have():
    assert set(FEW_TOKENS) < set(MANY_TOKENS)


@pytest.mark.parametrize(
    ("rules", "axes", "shard"),
    [
        (MANY_TOKENS, ("batch", None, "embed"), (4, 6, 4)),
        (FEW_TOKENS, ("batch", None, "embed"), (8, 6, 2)),
        (MANY_TOKENS, ("cached", None, "heads"), (4, 6, 2)),
        (FEW_TOKENS, ("cached", None, "heads"), (4, 6, 2)),
        (FEW_TOKENS, ("batch", None, "vocab"), (8, 6, 1)),
    ],
)
def test_an_array_lies_as_its_dimensions_names_say(mesh, rules, axes, shard):
    place = Placement(mesh, rules)
    placed = jax.jit(lambda x: place(x, *axes))(jnp.zeros((8, 6, 4)))
    assert placed.sharding.shard_shape(placed.shape) == shard
    assert [place.size(axis) if axis else 1 for axis in axes] == [
        size // part for size, part in zip(placed.shape, shard, strict=True)
    ]


@FEW_AND_MANY
@pytest.mark.parametrize("where", ["nowhere", "one device"])
def test_a_single_device_constrains_nothing(rules, where):
    place = Placement(None if where == "nowhere" else single_device_mesh(jax.devices()[0]), rules)
    x = jnp.zeros((3, 5))
    assert place(x, "batch", "embed") is x
    assert place.size("batch") == place.size("embed") == 1
    assert place.platform == "cpu"


def test_a_name_without_a_rule_is_an_error(mesh):
    with pytest.raises(KeyError, match="width"):
        Placement(mesh, MANY_TOKENS)(jnp.zeros(4), "width")
