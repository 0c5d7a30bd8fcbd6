"""Several JAX processes as one run: joining, who holds which rows of a batch, and values that all of them need.

Every process runs the same program on the same host values, so that all of them launch the same computations in the
same order. What only one process knows, such as a clip it has read, reaches the others through `gather`.
"""

import importlib.util
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from audio_grpo.errors import UserError

Value = TypeVar("Value")

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SMALLEST_MESSAGE = 4096
"""Bytes; messages are filled up to a power of two, so that few programs are compiled for them."""


def start_processes() -> None:
    """Join the run's other processes where the environment says that there are some; later calls do nothing.

    It says so by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by being a
    Slurm job of several tasks or a Cloud TPU host, whose pod JAX finds itself. Comes before any JAX computation.

    Raises:
        UserError: only some of the variables are set, or they do not fit together.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if given:
        address, count, index = _named_processes(given)
        if count > 1:
            jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate")
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 or _on_cloud_tpu():
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return jax.process_index() == 0


def gather(make: Callable[[], Value]) -> list[Value]:
    """What `make` returns in each process, in their order, in every process.

    Where `make` raises in one process all of them raise, rather than wait for it: it its own exception, the others a
    UserError where that was one, else a RuntimeError.
    """
    if jax.process_count() == 1:
        return [make()]
    own: _Outcome = _outcome(make)
    outcomes: list[_Outcome] = [pickle.loads(message) for message in _exchange(pickle.dumps(own.told()))]
    if own.error is not None:
        raise own.error
    for index, outcome in enumerate(outcomes):
        if outcome.failure is not None:
            kind = UserError if outcome.is_users else RuntimeError
            raise kind(f"In process {index}: {outcome.failure}")
    return [outcome.value for outcome in outcomes]


def host_value(array: Array) -> np.ndarray:
    """An array's whole value, in every process, also where other processes' devices hold parts of it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return process_allgather(array, tiled=True)


def held_rows(sharding: NamedSharding, rows: int) -> list[Int[np.ndarray, "n"]]:
    """Rows of a batch that each process's devices hold, rising; processes that share a row each have it.

    Raises:
        UserError: a process holds none.
    """
    held: list[set[int]] = [set() for _ in range(jax.process_count())]
    for device, (index, *_) in sharding.devices_indices_map((rows,)).items():
        held[device.process_index].update(range(rows)[index])
    idle = [index for index, own in enumerate(held) if not own]
    if idle:
        raise UserError(
            f"Of {len(held)} processes, the devices of {idle} are not in the mesh of {sharding.mesh.size} devices: "
            "start as many processes as the mesh has hosts."
        )
    return [np.asarray(sorted(own)) for own in held]


def share_out(rows: int) -> Int[np.ndarray, "n"]:
    """Of rows that all processes know, those that fall to this one; each falls to one process."""
    return np.array_split(np.arange(rows), jax.process_count())[jax.process_index()]


def global_array(sharding: NamedSharding, local: np.ndarray, own: Int[np.ndarray, "n"], rows: int) -> Array:
    """The array of all processes' rows, of which this one has `own`, those that its devices hold."""

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        wanted = np.arange(rows)[index[0] if index else ()]
        return local[np.searchsorted(own, wanted)]

    return jax.make_array_from_callback((rows, *local.shape[1:]), sharding, read)


class _Outcome(NamedTuple):
    value: Any = None
    failure: str | None = None
    is_users: bool = False
    error: Exception | None = None

    def told(self) -> "_Outcome":
        """What the others are told: an exception might not travel."""
        return self._replace(error=None)


def _outcome(make: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=make())
    except UserError as error:
        return _Outcome(failure=str(error), is_users=True, error=error)
    except Exception as error:
        return _Outcome(failure=f"{type(error).__name__}: {error}", error=error)


def _exchange(message: bytes) -> list[bytes]:
    sizes = process_allgather(np.int32(len(message)))
    room = max(_SMALLEST_MESSAGE, 1 << int(sizes.max() - 1).bit_length())
    padded = np.frombuffer(message.ljust(room, b"\0"), np.uint8)
    return [row[:size].tobytes() for row, size in zip(process_allgather(padded), sizes, strict=True)]


def _named_processes(given: Mapping[str, str]) -> tuple[str, int, int]:
    missing = [name for name in _VARIABLES if name not in given]
    if missing:
        raise UserError(
            f"There is {' and '.join(given)} without {' and '.join(missing)}: to run in several processes set "
            f"{', '.join(_VARIABLES)} in each of them; Slurm jobs and TPU pods need none of the three."
        )
    address, count, index = (given[name] for name in _VARIABLES)
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {address}: give host:port of process 0, such as 10.0.0.2:1234.")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(
            f"JAX_NUM_PROCESSES is {count} and JAX_PROCESS_ID is {index}: give a number of processes, and to each of "
            "them its own number from 0 to one less."
        )
    return address, int(count), int(index)


def _on_cloud_tpu() -> bool:
    """Whether TPU chips are here to be used, of a pod that a metadata server may be asked about."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if (wanted and "tpu" not in wanted) or "TPU_SKIP_MDS_QUERY" in os.environ:
        return False
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
