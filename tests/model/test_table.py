import jax
import jax.numpy as jnp
import numpy as np

from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import Weight, abstract, initialize, parameter_count, published_names
from audio_grpo.model.thinker import thinker_table
from small_model import small_config


def test_a_stacked_key_stands_for_one_published_tensor_per_index():
    names = dict(published_names("model.layers.*.mlp.experts.*.up_proj.weight", Weight((2, 3, 8, 4), (None,) * 4)))
    assert len(names) == 6
    assert names["model.layers.1.mlp.experts.2.up_proj.weight"] == (1, 2)


def test_a_key_without_a_star_stands_for_itself():
    assert dict(published_names("lm_head.weight", Weight((8, 4), (None, None)))) == {"lm_head.weight": ()}


def test_every_dimension_has_a_logical_axis_or_none():
    for key, weight in thinker_table(thinker_spec(small_config(num_experts=4))).items():
        assert len(weight.axes) == len(weight.shape), key


def test_initial_values_depend_on_seed_and_name_alone():
    table = thinker_table(thinker_spec(small_config()))
    whole = initialize(table, jax.random.key(3), jnp.float32)
    name = "model.layers.*.self_attn.q_proj.weight"
    alone = initialize({name: table[name]}, jax.random.key(3), jnp.float32)
    np.testing.assert_array_equal(whole[name], alone[name])
    assert np.abs(whole[name] - initialize(table, jax.random.key(4), jnp.float32)[name]).max() > 0


def test_shapes_and_counts_come_from_the_table():
    table = thinker_table(thinker_spec(small_config()))
    shapes = abstract(table, jnp.bfloat16)
    assert sum(np.prod(x.shape) for x in shapes.values()) == parameter_count(table)
    assert shapes["lm_head.weight"].shape == (256, 32)


def test_a_tied_decoder_has_no_head_of_its_own():
    assert "lm_head.weight" not in thinker_table(thinker_spec(small_config(logits_via_embedding=True)))
