import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audio_grpo.config import Config
from audio_grpo.grpo import TrainState, init_train_state
from audio_grpo.training.checkpoints import Checkpoints, latest_step, latest_weights

OPTIMIZER = optax.adamw(0.1)
DATA = json.dumps({"position": {"next": 7}, "skipped": {"seen": 3, "reasons": {"too long": ["a", "b"]}}}).encode()


def mesh_of(devices):
    return Mesh(np.asarray(jax.devices()[:devices]), ("fsdp",))


def state_on(mesh, dtype=jnp.float32, seed=0, updates=2):
    """A state some updates old, of one sharded and one replicated weight, that lies on the whole mesh."""
    shardings = {"w": NamedSharding(mesh, PartitionSpec("fsdp")), "b": NamedSharding(mesh, PartitionSpec())}
    rng = np.random.default_rng(seed)
    weights = {"w": jnp.asarray(rng.normal(size=(8, 3)), dtype), "b": jnp.asarray(rng.normal(size=3), dtype)}
    state = init_train_state(weights, OPTIMIZER)
    for _ in range(updates):
        precise = state.trainable if state.master is None else state.master
        gradients = {key: jnp.asarray(rng.normal(size=value.shape), jnp.float32) for key, value in weights.items()}
        changes, moments = OPTIMIZER.update(gradients, state.optimizer, precise)
        precise = optax.apply_updates(precise, changes)
        trainable = {key: value.astype(dtype) for key, value in precise.items()}
        master = None if state.master is None else precise
        state = TrainState(state.step + 1, state.skipped, trainable, master, moments)

    def place(path, leaf):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return jax.device_put(leaf, shardings[keys[-1]] if keys else NamedSharding(mesh, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(place, state)


def checkpoints_in(folder, **changes):
    return Checkpoints(epath.Path(folder), Config.model_validate(changes))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_comes_back_as_it_was(tmp_path, dtype, asynchronous):
    mesh = mesh_of(4)
    state = state_on(mesh, dtype)
    with checkpoints_in(tmp_path, async_checkpointing=asynchronous) as checkpoints:
        assert checkpoints.latest_step == 0
        checkpoints.save(2, state, DATA)
    with checkpoints_in(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 2
        restored = checkpoints.restore(state_on(mesh, dtype, seed=1, updates=0))
    assert_equal(restored.state, state)
    assert json.loads(restored.data) == json.loads(DATA)


@pytest.mark.parametrize(("wrote", "reads"), [(1, 4), (4, 1), (4, 2)])
def test_a_state_moves_to_another_number_of_devices(tmp_path, wrote, reads):
    state, like = state_on(mesh_of(wrote)), state_on(mesh_of(reads), seed=1, updates=0)
    with checkpoints_in(tmp_path) as checkpoints:
        checkpoints.save(2, state, DATA)
    with checkpoints_in(tmp_path) as checkpoints:
        restored = checkpoints.restore(like).state
    assert_equal(restored, state)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


def test_the_newest_checkpoints_are_kept(tmp_path):
    state = state_on(mesh_of(4))
    with checkpoints_in(tmp_path, max_num_checkpoints_to_keep=2) as checkpoints:
        for step in (5, 10, 15):
            checkpoints.save(step, state, DATA)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["10", "15"]
    assert latest_step(epath.Path(tmp_path)) == 15


def test_weights_are_read_without_the_rest_and_in_the_dtype_asked_for(tmp_path):
    mesh = mesh_of(4)
    older, newer = state_on(mesh), state_on(mesh, seed=1)
    with checkpoints_in(tmp_path) as checkpoints:
        checkpoints.save(1, older, DATA)
        checkpoints.save(2, newer, DATA)
    shardings = {key: value.sharding for key, value in newer.trainable.items()}
    assert_equal(latest_weights(epath.Path(tmp_path), shardings, jnp.float32), newer.trainable)
    narrow = latest_weights(epath.Path(tmp_path), shardings, jnp.bfloat16)
    assert_equal(narrow, jax.tree.map(lambda x: x.astype(jnp.bfloat16), newer.trainable))


@pytest.mark.parametrize("name", ["", "missing"])
def test_where_there_is_no_checkpoint_there_are_no_weights(tmp_path, name):
    assert latest_step(epath.Path(tmp_path / name)) == 0
    assert latest_weights(epath.Path(tmp_path / name), {}, jnp.float32) == {}


def test_a_checkpoint_that_was_never_finished_is_no_checkpoint(tmp_path):
    state = state_on(mesh_of(4))
    with checkpoints_in(tmp_path) as checkpoints:
        checkpoints.save(1, state, DATA)
    (tmp_path / "2.orbax-checkpoint-tmp-1").mkdir()
    assert latest_step(epath.Path(tmp_path)) == 1
    with checkpoints_in(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
