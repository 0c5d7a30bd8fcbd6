"""Programs in Python processes of their own, each with as many forced CPU devices as one likes."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_TESTS = Path(__file__).parent


class Ended(NamedTuple):
    """What a process left."""

    status: int
    output: str
    errors: str


def run_processes(*arguments: str, devices: int, processes: int = 1) -> list[Ended]:
    """Run `python arguments` in so many processes of one run, each with `devices` CPU devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # Threads were asked for by the number of this process's devices; the new ones have their own.
    inherited = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    environment = inherited | {
        "PYTHONPATH": os.pathsep.join([str(_TESTS), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = []
    for index in range(processes):
        place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment | (place if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
    try:
        told = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(started, told, strict=True)]
