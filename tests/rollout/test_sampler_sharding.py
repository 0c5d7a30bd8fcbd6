import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from audio_grpo.parallel.activations import FEW_TOKENS, Placement
from audio_grpo.parallel.mesh import create_mesh
from audio_grpo.rollout.sampler import Sampling, draw
from small_model import small_config

ROWS, VOCAB, WIDTH = 64, 4096, 32
MESHES = [
    {"ici_fsdp_parallelism": 4},
    {"ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 2},
    {"ici_data_parallelism": 2, "ici_fsdp_parallelism": 1, "ici_tensor_parallelism": 2},
]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(VOCAB, WIDTH)) * 0.5
    allowed, uniform = rng.random((1, VOCAB)) < 0.9, jax.random.uniform(jax.random.key(0), (ROWS, 2))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), jnp.asarray(allowed), uniform


def compiled(sampling, mesh_sizes, arrays):
    """The draw over a mesh, with the head where decoding has it, and its arguments."""
    place = Placement(create_mesh(small_config(**mesh_sizes), jax.devices()[:4]), FEW_TOKENS)
    hidden, head, allowed, uniform = arrays
    head = jax.device_put(head, NamedSharding(place.mesh, PartitionSpec(FEW_TOKENS["vocab"], None)))
    everywhere = NamedSharding(place.mesh, PartitionSpec())
    args = [jax.device_put(hidden, everywhere), head, *(jax.device_put(x, everywhere) for x in (allowed, uniform))]
    return jax.jit(lambda *args: draw(sampling, *args, place)).lower(*args).compile(), args


@pytest.mark.parametrize("mesh_sizes", MESHES, ids=str)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.9), Sampling(greedy=True), Sampling(top_p=0.9)], ids=str)
def test_four_devices_draw_what_one_draws(sampling, mesh_sizes, arrays):
    run, args = compiled(sampling, mesh_sizes, arrays)
    here = Placement(None, FEW_TOKENS)
    alone = jax.jit(lambda *args: draw(sampling, *args, here))(*arrays)
    for ours, theirs in zip(run(*args), alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("mesh_sizes", MESHES, ids=str)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.9), Sampling(greedy=True)], ids=str)
def test_devices_exchange_nothing_as_long_as_the_vocabulary(sampling, mesh_sizes, arrays):
    text = compiled(sampling, mesh_sizes, arrays)[0].as_text()
    moved = [
        int(np.prod([int(n) for n in shape.split(",") if n]))
        for line in text.splitlines()
        if re.search(r" (all-gather|all-to-all|all-reduce|collective-permute)\(", line)
        for shape in re.findall(r"\w+\[([\d,]*)\]", line.split("=")[1].split("(all")[0])[:1]
    ]
    assert moved, "the devices must exchange something to agree on a token"
    assert max(moved) < VOCAB
