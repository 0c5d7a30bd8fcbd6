"""TPU slices by name, and abstract devices to compile for them without having one."""

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.topologies import get_topology_desc

from audio_grpo.errors import UserError
from audio_grpo.plan.chips import TPU_CHIPS, Chip

_CUBES = {
    1: (1, 1, 1),
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
}
_SQUARES = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}


@dataclass(frozen=True)
class _Kind:
    """How slices of a chip are named and what libtpu must be told of them."""

    shapes: Mapping[int, tuple[int, ...]]
    cores: int  # TensorCores by which a name counts a chip
    config: str  # megacore joins a chip's two TensorCores into one device


_KINDS = {
    "v4": _Kind(_CUBES, 2, "megacore"),
    "v5e": _Kind(_SQUARES, 1, "default"),
    "v5p": _Kind(_CUBES, 2, "megacore"),
    "v6e": _Kind(_SQUARES, 1, "default"),
}


@dataclass(frozen=True)
class Topology:
    """A TPU slice.

    Attributes:
        name: its name, such as v4-8.
        chip: the kind of its chips.
        shape: chips along each dimension of its torus or mesh.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips; each is one JAX device."""
        return math.prod(self.shape)


def topology_names() -> list[str]:
    """Every name that `parse_topology` knows, but for the alias v5litepod; v4-2 and v5p-2 are a single chip."""
    return [f"{kind}-{chips * how.cores}" for kind, how in _KINDS.items() for chips in how.shapes]


def parse_topology(name: str) -> Topology:
    """The slice of a name such as v4-8; v4 and v5p names count TensorCores, two a chip, v5e and v6e names count chips.

    Raises:
        UserError: no such slice; the message names the nearest ones.
    """
    found = re.fullmatch(r"(v\w+)-([1-9]\d*)", name.strip().lower().replace("v5litepod", "v5e"))
    if found is None or found[1] not in _KINDS:
        kinds = ", ".join(f"{kind}-{4 * how.cores}" for kind, how in _KINDS.items())
        raise UserError(f"topology {name!r} is not a TPU slice that can be planned; give a name such as {kinds}.")
    kind, size = found[1], int(found[2])
    how = _KINDS[kind]
    sizes = {chips * how.cores: shape for chips, shape in how.shapes.items()}
    if size not in sizes:
        nearest = sorted(sorted(sizes, key=lambda known: abs(math.log(known / size)))[:2])
        counted = "TensorCores, two a chip" if how.cores == 2 else "chips"
        raise UserError(
            f"topology {name!r} does not exist: {kind} slices count {counted}, and the nearest are "
            f"{' and '.join(f'{kind}-{known}' for known in nearest)}."
        )
    return Topology(f"{kind}-{size}", TPU_CHIPS[kind], sizes[size])


def topology_devices(topology: Topology) -> list[Any]:
    """One abstract device for each chip: programs can be compiled for it, nothing can run on it.

    Raises:
        UserError: libtpu, which holds the compiler, is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'planning for {topology.name} needs TPU\'s compiler, libtpu: run pip install "audio-grpo[plan]".'
        )
    shape = topology.shape
    with _without_a_tpu(topology.name):
        description = get_topology_desc(
            f"{topology.chip.name}:{'x'.join(map(str, shape))}",
            platform="tpu",
            chip_config_name=_KINDS[topology.chip.name].config,
            chips_per_host_bounds=(min(2, shape[0]), min(2, shape[1]), 1),
            num_slices=1,
        )
    return description.devices


def compile_ahead(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program lowered for abstract devices, keeping it out of JAX's persistent cache.

    The cache would store it, but without the device can not read it back: it warns, and compiles again.
    """
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        return lowered.compile()
    finally:
        jax.config.update(option, before)


@contextmanager
def _without_a_tpu(name: str) -> Iterator[None]:
    """Keep libtpu, while it loads, from seeking a TPU.

    Without these variables it waits for Google Cloud's metadata server, and it takes a lock on the machine that a
    second process can not get. They are put back because programs for a TPU that is attached do need both.
    """
    settings = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": name,
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
