from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audio_grpo.parallel.moving import moved

VALUES = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
SPECS = (PartitionSpec(), PartitionSpec("a"), PartitionSpec(None, "a"))


def line(first, count):
    return Mesh(np.asarray(jax.devices()[first : first + count]), "a")


@pytest.fixture
def host_is_closed(monkeypatch):
    """Bringing an array to the host raises."""
    bring = type(jnp.zeros(1))._value.fget

    def close():
        monkeypatch.setattr(type(jnp.zeros(1)), "_value", property(lambda _: pytest.fail("brought to the host")))

    def reopen():
        monkeypatch.setattr(type(jnp.zeros(1)), "_value", property(bring))

    return close, reopen


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("ours", "theirs"), list(product(SPECS, SPECS)))
def test_an_array_arrives_whole_and_never_visits_the_host(count, ours, theirs, host_is_closed):
    close, reopen = host_is_closed
    x = jax.device_put(VALUES, NamedSharding(line(0, count), ours))
    wanted = NamedSharding(line(count, 4 - count), theirs)
    close()
    y = moved(x, wanted)
    reopen()
    assert y.sharding == wanted
    np.testing.assert_array_equal(y, VALUES)
    for shard in y.addressable_shards:
        np.testing.assert_array_equal(shard.data, VALUES[shard.index])


def test_a_cut_along_two_dimensions_is_put_together_anew():
    devices = np.asarray(jax.devices())
    grid = Mesh(devices.reshape(2, 2), ("a", "b"))
    x = jax.device_put(VALUES, NamedSharding(grid, PartitionSpec("a", "b")))
    for spec in (PartitionSpec(), PartitionSpec("a")):
        y = moved(x, NamedSharding(line(3, 1), spec))
        np.testing.assert_array_equal(y, VALUES)


def test_what_was_moved_outlives_a_donated_original():
    sharding = NamedSharding(line(0, 2), PartitionSpec("a"))
    double = jax.jit(lambda x: 2 * x, donate_argnums=0, out_shardings=sharding)
    x = jax.device_put(VALUES, sharding)
    copies = [moved(x, NamedSharding(line(2, 2), spec)) for spec in SPECS]
    doubled = double(x)
    assert x.is_deleted()
    np.testing.assert_array_equal(doubled, 2 * VALUES)
    for copy in copies:
        np.testing.assert_array_equal(copy, VALUES)


def test_on_its_own_devices_an_array_is_only_laid_out():
    x = jax.device_put(VALUES, NamedSharding(line(0, 2), PartitionSpec("a")))
    assert moved(x, x.sharding) is x
    np.testing.assert_array_equal(moved(x, NamedSharding(line(0, 2), PartitionSpec(None, "a"))), VALUES)
