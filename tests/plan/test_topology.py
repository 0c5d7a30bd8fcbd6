import importlib.util
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audio_grpo.errors import UserError
from audio_grpo.plan.chips import GIB, TPU_CHIPS, local_chip
from audio_grpo.plan.topology import compile_ahead, parse_topology, topology_devices, topology_names
from tpu_compiler import needs_libtpu


def compiled_scan(devices, layers=3, width=256):
    """A scan of products whose weights and rows are split over all devices, compiled for them."""
    mesh = Mesh(np.asarray(devices), ("all",))

    def split(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def program(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    weights = split((layers, width, width), None, "all")
    return compile_ahead(jax.jit(program).lower(weights, split((8 * len(devices), width), "all")))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v4-2", (1, 1, 1)),
        ("v4-8", (2, 2, 1)),
        ("v4-16", (2, 2, 2)),
        ("v4-32", (2, 2, 4)),
        ("v4-64", (2, 4, 4)),
        ("v5p-8", (2, 2, 1)),
        ("v5e-1", (1, 1)),
        ("v5e-8", (2, 4)),
        ("v6e-16", (4, 4)),
    ],
)
def test_a_name_has_the_shape_that_google_documents(name, shape):
    assert parse_topology(name).shape == shape


def test_v4_and_v5p_count_tensor_cores_and_v5e_and_v6e_count_chips():
    for name in topology_names():
        kind, size = name.split("-")
        assert parse_topology(name).chips == int(size) // (2 if kind in ("v4", "v5p") else 1)


def test_v5litepod_is_v5e():
    assert parse_topology("v5litepod-16") == parse_topology("v5e-16")


@pytest.mark.parametrize(("name", "nearest"), [("v4-12", "v4-8 and v4-16"), ("v5e-2", "v5e-1 and v5e-4")])
def test_a_size_that_does_not_exist_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(UserError, match=nearest):
        parse_topology(name)


@pytest.mark.parametrize("name", ["v3-8", "h100", "v4", "v4-0", "v4-x", ""])
def test_a_name_of_no_known_kind_is_refused_with_names_that_work(name):
    with pytest.raises(UserError, match="v4-8, v5e-4, v5p-8, v6e-4"):
        parse_topology(name)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'pip install "audio-grpo\[plan\]"'):
        topology_devices(parse_topology("v4-8"))


@needs_libtpu
def test_a_sharded_scan_compiles_for_slices_of_every_kind_one_after_another():
    for name in ("v4-2", "v4-8", "v5e-1", "v5e-8", "v5p-2", "v5p-32", "v6e-1", "v6e-32", "v4-64"):
        topology = parse_topology(name)
        devices = topology_devices(topology)
        assert len(devices) == math.prod(topology.shape)
        stats = compiled_scan(devices).memory_analysis()
        rows = 8 * 256 * 2
        assert rows < stats.argument_size_in_bytes <= 3 * 256 * 256 * 2 + 16 * rows
    assert jax.default_backend() == "cpu"


@needs_libtpu
def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "kept")
    before = dict(os.environ)
    topology_devices(parse_topology("v6e-4"))
    assert dict(os.environ) == before


@needs_libtpu
@pytest.mark.parametrize("name", ["v4-2", "v5e-1", "v5p-2", "v6e-1"])
def test_the_compiler_refuses_a_program_beyond_the_memory_we_state(name):
    topology = parse_topology(name)
    (device,) = topology_devices(topology)
    sharding = jax.sharding.SingleDeviceSharding(device)
    too_large = jax.ShapeDtypeStruct((1 << 18, 1 << 18), jnp.bfloat16, sharding=sharding)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"{topology.chip.memory / GIB:.2f}G"):
        jax.jit(lambda x: (x @ x).sum()).lower(too_large).compile()


def test_the_local_chip_is_measured():
    chip = local_chip(jnp.float32)
    assert chip.name == jax.devices()[0].device_kind
    shares = jax.local_device_count()
    assert (1 << 28) / shares < chip.memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / shares
    assert 1e8 < chip.flops < min(tpu.flops for tpu in TPU_CHIPS.values())
    assert 1e7 < chip.bandwidth < 4e12
