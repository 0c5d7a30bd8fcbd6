import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audio_grpo.model.grouped import pallas
from audio_grpo.plan.collectives import collective_bytes
from audio_grpo.plan.cost import program_cost
from audio_grpo.plan.flops import Counting, program_flops
from audio_grpo.plan.hlo import parse_module
from audio_grpo.plan.topology import compile_ahead, parse_topology, topology_devices
from audio_grpo.plan.traffic import MEMORY, program_traffic
from tpu_compiler import needs_libtpu


def flops(function, *shapes, platform="cpu", **settings):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return program_flops(jax.jit(function).trace(*arguments).jaxpr, Counting(platform=platform, **settings))


def cost(function, *arguments, chips=1, platform="cpu", donate=(), **settings):
    traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
    counting = Counting(platform=platform, **settings)
    return program_cost(traced.jaxpr, compile_ahead(traced.lower()), chips=chips, counting=counting)


def array(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def traffic(text, **settings):
    return program_traffic(parse_module(text), **settings)


# Operations.


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 4))
def test_products_without_loops_count_what_xla_counts(sizes):
    batch, rows, inner, columns = sizes
    shapes = (batch, rows, inner), (batch, inner, columns)
    function = functools.partial(jnp.einsum, "brk,bkc->brc")
    lowered = jax.jit(function).lower(*(array(*shape) for shape in shapes))
    assert flops(function, *shapes) == lowered.cost_analysis()["flops"]


def test_a_grouped_convolution_counts_what_xla_counts():
    function = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(2,), padding="VALID", feature_group_count=3
    )
    lowered = jax.jit(function).lower(array(2, 6, 21), array(12, 2, 5))
    assert flops(function, (2, 6, 21), (12, 2, 5)) == lowered.cost_analysis()["flops"]


def test_a_scan_counts_its_body_by_its_length_and_its_gradient_twice_more_and_again_when_rematerialised():
    def loss(weights, x, wrap):
        return jax.lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, weights)[0].sum()

    once = 7 * 2 * 3 * 5 * 5
    shapes = (7, 5, 5), (3, 5)
    assert flops(functools.partial(loss, wrap=lambda f: f), *shapes) == once
    assert flops(jax.grad(functools.partial(loss, wrap=lambda f: f), (0, 1)), *shapes) == 3 * once
    assert flops(jax.grad(functools.partial(loss, wrap=jax.checkpoint), (0, 1)), *shapes) == 4 * once


def test_a_while_counts_the_steps_it_is_given():
    def function(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    assert flops(function, (4, 4), while_steps=11) == 11 * 2 * 4**3


def test_a_branch_counts_the_costliest_and_a_platforms_branch_only_its_own():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    def by_platform(x):
        return jax.lax.platform_dependent(x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x)

    assert flops(either, (4, 4)) == 2 * 2 * 4**3
    assert flops(by_platform, (4, 4), platform="cpu") == 2 * 2 * 4**3
    assert flops(by_platform, (4, 4), platform="tpu") == 2 * 4**3


def test_a_ragged_product_counts_its_rows_once_in_each_of_its_forms():
    def function(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([4, 3, 5])).sum()

    once = 2 * 12 * 6 * 8
    assert flops(function, (12, 6), (3, 6, 8)) == once
    assert flops(jax.grad(function, (0, 1)), (12, 6), (3, 6, 8)) == 3 * once


def test_a_shard_map_counts_every_device():
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("a", "b"))

    def body(x):
        return x @ x.T

    mapped = jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a"), check_vma=False)
    assert flops(mapped, (8, 4)) == 4 * 2 * 4 * 4 * 4


@pytest.mark.parametrize("estimate", [None, 12345])
def test_a_kernel_counts_its_estimate_or_its_body_for_each_point_of_its_grid(estimate):
    def kernel(x, y):
        y[...] = x[...] @ x[...]

    def function(x):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32),
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 8), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
            cost_estimate=estimate and pl.CostEstimate(flops=estimate, transcendentals=0, bytes_accessed=0),
            interpret=True,
        )(x)

    assert flops(function, (32, 8)) == (estimate or 4 * 2 * 8**3)


# Memory and traffic.


def test_a_product_reads_its_operands_and_writes_its_result_once():
    found = cost(lambda x, y: x @ y, array(64, 32), array(32, 16))
    assert found.memory_traffic == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert (found.arguments, found.outputs, found.aliased) == (4 * (64 * 32 + 32 * 16), 4 * 64 * 16, 0)
    assert found.flops == 2 * 64 * 32 * 16
    assert found.collectives == {}


def test_a_donated_argument_counts_once_in_the_total():
    def function(x):
        return x + 1

    kept, donated = cost(function, array(1024)), cost(function, array(1024), donate=0)
    assert donated.aliased == 4096
    assert kept.total - donated.total == 4096


def test_a_scan_reads_one_layer_a_turn_and_is_multiplied_out():
    def function(weights, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    layers, width = 64, 128
    found = cost(function, array(layers, width, width), array(width))
    weights = 4 * layers * width * width
    assert found.guessed_loops == ()
    assert weights <= found.memory_traffic < 4.5 * weights  # unoptimised, a slice is written, read, and perhaps copied


def test_a_loop_of_unknown_length_is_named_and_counts_the_steps_given():
    def function(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    one, ten = (cost(function, array(64, 64), while_steps=steps) for steps in (1, 10))
    assert len(one.guessed_loops) == 1
    assert "while" in one.guessed_loops[0]
    assert 7 * one.memory_traffic < ten.memory_traffic <= 10 * one.memory_traffic


TABLE = "f32[1000,1024]{1,0}"
LOOKUP = f"""HloModule lookup, num_partitions=1

%picked (table: f32[1000,1024], row: s32[]) -> f32[1,1024] {{
  %table = {TABLE} parameter(0)
  %row = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,1024]{{1,0}} dynamic-slice(%table, %row, %zero), dynamic_slice_sizes={{1,1024}}
}}

%put (table.1: f32[1000,1024], new: f32[1,1024], row.1: s32[]) -> f32[1000,1024] {{
  %table.1 = {TABLE} parameter(0)
  %new = f32[1,1024]{{1,0}} parameter(1)
  %row.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = {TABLE} dynamic-update-slice(%table.1, %new, %row.1, %zero.1)
}}

ENTRY %main (t: f32[1000,1024], r: s32[]) -> f32[1000,1024] {{
  %t = {TABLE} parameter(0)
  %r = s32[] parameter(1)
  %read = f32[1,1024]{{1,0}} fusion(%t, %r), kind=kLoop, calls=%picked, metadata={{op_name="jit(f)/read"}}
  ROOT %written = {TABLE} fusion(%t, %read, %r), kind=kLoop, calls=%put, metadata={{op_name="jit(f)/write"}}
}}
"""


def test_fusions_that_slice_or_update_count_what_they_touch():
    row = 4 * 1024
    assert traffic(LOOKUP)[MEMORY] == 2 * row + 4 + 2 * row + 4


COUNTED = """HloModule counted, num_partitions=4

%turn (state: (s32[], f32[256])) -> (s32[], f32[256]) {
  %state = (s32[], f32[256]{0}) parameter(0)
  %turns = s32[] get-tuple-element(%state), index=0
  %one = s32[]{:T(128)} constant(1)
  %more = s32[] add(%turns, %one)
  %x = f32[256]{0} get-tuple-element(%state), index=1
  %sum = f32[256]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %next = (s32[], f32[256]{0}) tuple(%more, %sum)
}

%going (state.1: (s32[], f32[256])) -> pred[] {
  %state.1 = (s32[], f32[256]{0}) parameter(0)
  %turns.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(7)
  ROOT %lt = pred[] compare(%turns.1, %limit), direction=LT
}

ENTRY %main (y: f32[256]) -> f32[256] {
  %y = f32[256]{0} parameter(0)
  %start = s32[] constant(2)
  %copied = s32[] copy(%start)
  %states = (s32[], f32[256]{0}) tuple(%copied, %y)
  %loop = (s32[], f32[256]{0}) while(%states), condition=%going, body=%turn
  ROOT %out = f32[256]{0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_from_a_constant_to_a_constant_is_counted_without_the_compilers_note():
    assert traffic(COUNTED)["all-reduce"] == 5 * 2 * 1024 // 2


GROUPS = ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]", "[2,4]<=[4,2]T(1,0)", "mesh['a'=2,'b'=4] {'b'}"]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    ("kind", "given", "got", "sent"),
    [
        ("all-gather", 25, 100, 300),
        ("reduce-scatter", 100, 25, 300),
        ("all-reduce", 100, 100, 600),
        ("all-to-all", 100, 100, 300),
    ],
)
def test_a_ring_of_four_sends_three_quarters(groups, kind, given, got, sent):
    text = f"""HloModule collective, num_partitions=8

ENTRY %main (x: f32[{given}]) -> f32[{got}] {{
  %x = f32[{given}]{{0}} parameter(0)
  ROOT %y = f32[{got}]{{0}} {kind}(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}
}}
"""
    module = parse_module(text)
    assert collective_bytes(module, module.entry, module.entry.root) == {kind: sent}
    assert traffic(text) == {kind: sent, MEMORY: 4 * (given + got)}


@pytest.mark.parametrize(
    ("layout", "size"),
    [("{1,0:T(8,128)}", 16 * 256 * 2), ("{0,1:T(8,128)(2,1)}", 136 * 128 * 2), ("{1,0}", 10 * 130 * 2)],
)
def test_an_array_occupies_whole_tiles(layout, size):
    module = parse_module(
        f"HloModule m\n\nENTRY %main (x: bf16[10,130]) -> () {{\n  ROOT %x = bf16[10,130]{layout} parameter(0)\n}}\n"
    )
    assert module.entry.root.arrays[0].bytes == size


def test_buffers_are_the_arrays_that_are_written_and_not_those_inside_fusions_or_arguments():
    def function(x, y):
        return jnp.sort(x @ y).sum()

    found = cost(function, array(4096, 8), array(8, 512))
    assert {buffer.dims for buffer in found.buffers} == {(4096, 512)}
    assert found.buffers[0].bytes == 4096 * 512 * 4
    assert any("sort" in buffer.op_name for buffer in found.buffers)
    assert set(found.dimensions()) == {4096, 512}


# A program for a TPU.


@needs_libtpu
@pytest.mark.parametrize("name", ["v4-8", "v5e-4"])
def test_a_sharded_gradient_compiled_for_tpu_moves_its_weights_three_times(name):
    """Gathered weights forward and backward, and gradients scattered: 3/4 of them each on four chips, by hand."""
    topology = parse_topology(name)
    mesh = Mesh(np.asarray(topology_devices(topology)), ("fsdp",))
    layers, width, rows = 6, 512, 1 << 17  # what is kept is too large for the memory in the chip

    def step(weights, x):
        turn = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return weights - jax.grad(lambda w: jax.lax.scan(turn, x, w)[0].astype(jnp.float32).mean())(weights)

    def split(*shape, axes):
        return array(*shape, dtype=jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    weights = split(layers, width, width, axes=(None, "fsdp"))
    found = cost(step, weights, split(rows, width, axes=("fsdp",)), chips=topology.chips, platform="tpu", donate=0)

    whole = 2 * layers * width * width
    once = 2 * layers * width * width * rows
    assert found.flops == 4 * once / 4  # forward, again for the gradient, and two products back
    assert found.arguments == (whole + 2 * rows * width) // 4
    assert found.aliased == whole // 4
    assert found.guessed_loops == ()
    assert found.collectives["all-gather"] == pytest.approx(2 * whole * 3 / 4, rel=0.01)
    assert found.collectives["reduce-scatter"] == pytest.approx(whole * 3 / 4, rel=0.01)
    kept = layers * rows * width * 2 // 4
    assert kept < found.temporaries < 1.5 * kept
    assert 2 * kept < found.memory_traffic < 12 * kept
    assert (layers, rows // 4, width) in {buffer.dims for buffer in found.buffers}
    assert rows not in found.dimensions()


def test_a_grouped_kernel_counts_the_share_of_its_rows_that_it_computes():
    def product(x, sizes, matrices):
        return pallas(256, sizes).product(x, matrices)

    shapes = (array(256, 128), jax.ShapeDtypeStruct((4,), jnp.int32), array(4, 128, 128))
    jaxpr = jax.jit(product).trace(*shapes).jaxpr
    assert program_flops(jaxpr, Counting(platform="tpu")) == 2 * 256 * 128 * 128
    assert program_flops(jaxpr, Counting(platform="tpu", routed_share=0.25)) == 2 * 256 * 128 * 128 / 4
