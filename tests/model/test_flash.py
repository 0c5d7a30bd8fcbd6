import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audio_grpo.model import flash as flash_module
from audio_grpo.model.attention import Projected, attend, own_segment
from audio_grpo.model.flash import causal_attention, flash_supports, group_attention
from audio_grpo.parallel.mesh import BATCH_AXES, MESH_AXES

H, K, N = 4, 2, 8


def projected(seed, rows, length, dtype=jnp.float32):
    shapes = [(rows, length, heads, N) for heads in (H, K, K)]
    keys = jax.random.split(jax.random.key(seed), 3)
    return Projected(*(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)))


def group(groups, generations, prompt_length, completion_length, dtype=jnp.float32):
    return projected(0, groups, prompt_length, dtype), projected(1, groups * generations, completion_length, dtype)


def real_positions(prompts, lengths):
    return jnp.arange(prompts.keys.shape[1]) < lengths[:, None]


def plain(prompts, completions, lengths):
    shared = own_segment(prompts)._replace(mask=real_positions(prompts, lengths)[:, None])
    prompt = attend(prompts.queries, [own_segment(prompts)])
    return prompt, attend(completions.queries, [shared, own_segment(completions)])


def flash(prompts, completions, lengths, mesh=None):
    return group_attention(prompts, completions, lengths, mesh=mesh, interpret=True)


def assert_same(got, expected, prompts, lengths, tolerance):
    real = np.asarray(real_positions(prompts, lengths))
    np.testing.assert_allclose(
        np.asarray(got[0], np.float32)[real], np.asarray(expected[0], np.float32)[real], atol=tolerance
    )
    np.testing.assert_allclose(np.asarray(got[1], np.float32), np.asarray(expected[1], np.float32), atol=tolerance)


CASES = {
    "short": (1, 3, 7, 5, [4]),
    "one completion, full prompts": (2, 1, 128, 128, [128, 128]),
    "lengths that are no multiples of blocks": (2, 3, 150, 130, [150, 3]),
}


def assert_values_and_gradients_are_plain(attention, prompts, completions, lengths):
    weights = jax.tree.map(jnp.sin, (prompts.queries, completions.queries))
    real = real_positions(prompts, lengths)[..., None, None]

    def outcome(attention):
        def loss(prompts, completions):
            out = attention(prompts, completions, lengths)
            return jnp.sum(jnp.where(real, out[0], 0) * weights[0]) + jnp.sum(out[1] * weights[1]), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(prompts, completions)
        return out, gradients

    (got, gradients), (expected, expected_gradients) = outcome(attention), outcome(plain)
    assert_same(got, expected, prompts, lengths, 1e-5)
    assert np.isfinite(got[0]).all()
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_those_of_plain_attention(case):
    *shape, lengths = case
    assert_values_and_gradients_are_plain(flash, *group(*shape), jnp.asarray(lengths))


def test_bfloat16_differs_by_its_rounding_only():
    prompts, completions = group(1, 2, 20, 9, jnp.bfloat16)
    lengths = jnp.asarray([11])
    got = jax.jit(flash)(prompts, completions, lengths)
    assert got[0].dtype == got[1].dtype == jnp.bfloat16
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (prompts, completions))
    assert_same(got, plain(*wide, lengths), prompts, lengths, 0.03)


@pytest.mark.parametrize("length", [1, 128, 300])
def test_causal_attention_is_that_of_plain_attention(length):
    x = projected(2, 2, length)
    got = jax.jit(lambda x: causal_attention(x, interpret=True))(x)
    np.testing.assert_allclose(got, attend(x.queries, [own_segment(x)]), atol=1e-5)


@pytest.mark.parametrize("sizes", [(4, 1, 1, 1), (1, 1, 2, 2)])
def test_a_mesh_changes_nothing(sizes):
    mesh = Mesh(np.asarray(jax.devices()).reshape(sizes), MESH_AXES)
    prompts, completions = group(4, 2, 9, 6)
    lengths = jnp.asarray([9, 1, 5, 8])
    assert_values_and_gradients_are_plain(partial(flash, mesh=mesh), prompts, completions, lengths)
    causal = jax.jit(lambda x: causal_attention(x, mesh=mesh, interpret=True))(prompts)
    np.testing.assert_allclose(causal, attend(prompts.queries, [own_segment(prompts)]), atol=1e-5)


def test_empty_blocks_are_skipped_and_one_block_of_mask_is_stored():
    kernel = flash_module._kernel(flash_module._GroupMask(512, 256, 8), 32, 256, False)
    assert np.count_nonzero(kernel.fwd_mask_info.block_mask) == 3 + 8 * 3
    assert kernel.fwd_mask_info.partial_mask_blocks.shape == (1, 256, 256)


@pytest.fixture
def v4_8(monkeypatch):
    pytest.importorskip("libtpu")
    alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    options = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "num_slices": 1}
    chips = topologies.get_topology_desc("v4:2x2x1", platform="tpu", **options).devices
    cached_from = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)  # without a TPU they can not be read back
    yield Mesh(np.asarray(chips).reshape(1, 4, 1, 1), MESH_AXES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", cached_from)


def abstract(mesh, width, dtype=jnp.bfloat16, groups=4, generations=8, heads=32, kv_heads=4, lengths=(430, 256)):
    """Inputs of `group_attention` at the published model's sizes."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def shapes(rows, length):
        counts = (heads, kv_heads, kv_heads)
        return Projected(*(jax.ShapeDtypeStruct((rows, length, n, width), dtype, sharding=sharding) for n in counts))

    prompt, completion = lengths
    prompt_lengths = jax.ShapeDtypeStruct((groups,), jnp.int32, sharding=sharding)
    return shapes(groups, prompt), shapes(groups * generations, completion), prompt_lengths


def gradients(attention):
    def run(prompts, completions, lengths):
        out, pull = jax.vjp(lambda *x: attention(*x, lengths), prompts, completions)
        return out, pull(out)

    return run


def largest_array(compiled):
    shapes = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


def test_the_published_model_compiles_for_tpu_without_scores(v4_8):
    inputs = abstract(v4_8, 128)
    a_chips_scores = 32 * 8 * 256 * 430

    def flash(*args):
        return group_attention(*args, mesh=v4_8)

    for attention, holds_scores in ((flash, False), (gradients(flash), False), (plain, True)):
        compiled = jax.jit(attention).lower(*inputs).compile()
        assert (largest_array(compiled) >= a_chips_scores) == holds_scores


@pytest.mark.parametrize(
    ("width", "dtype"), [(8, jnp.bfloat16), (64, jnp.bfloat16), (200, jnp.float32), (256, jnp.float32)]
)
def test_supported_head_widths_compile_for_tpu_with_the_largest_blocks(v4_8, width, dtype):
    assert flash_supports(width)
    inputs = abstract(v4_8, width, dtype, generations=2, heads=4, kv_heads=2, lengths=(700, 600))
    jax.jit(gradients(lambda *args: group_attention(*args, mesh=v4_8))).lower(*inputs).compile()
    jax.jit(lambda x: causal_attention(x, mesh=v4_8)).lower(inputs[0]).compile()


@pytest.mark.parametrize("width", [4, 100, 264])
def test_other_head_widths_are_known_not_to_be_supported(width):
    assert not flash_supports(width)
