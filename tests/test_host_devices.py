import os
from pathlib import Path

import pytest

from audio_grpo.host_devices import room_to_wait
from several_processes import run_processes

COUNT = """
import audio_grpo, jax
from pathlib import Path
jax.devices()
print(sum("XLAEigen" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir()))
"""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("PJRT_NPROC", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value", "threads"),
    [
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=4", "32"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_force_host_platform_device_count=2", "16"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=1", None),
        ("JAX_NUM_CPU_DEVICES", "3", "24"),
        ("JAX_NUM_CPU_DEVICES", "", None),
    ],
)
def test_forced_devices_have_threads_to_wait_with(monkeypatch, name, value, threads):
    monkeypatch.setenv(name, value)
    room_to_wait()
    assert os.environ.get("PJRT_NPROC") == threads


def test_the_users_number_is_kept(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.setenv("PJRT_NPROC", "5")
    room_to_wait()
    assert os.environ["PJRT_NPROC"] == "5"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux names them")
def test_importing_the_package_is_enough():
    ended = run_processes("-c", COUNT, devices=4)[0]
    assert ended.output.strip() == "32", ended.errors
