import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from audio_grpo.errors import UserError
from audio_grpo.parallel.processes import gather, held_rows, host_value, is_first, share_out, start_processes
from several_processes import run_processes

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

TOGETHER = """
import json
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from audio_grpo.parallel.processes import gather, global_array, held_rows, host_value, is_first, share_out
from audio_grpo.parallel.processes import start_processes

start_processes()
start_processes()
index = jax.process_index()
mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("a", "b"))
whole, told = np.arange(24.0).reshape(8, 3), {"first": is_first(), "share": share_out(5).tolist()}
told["long"] = [len(text) for text in gather(lambda: "x" * (9000 * index + 1))]
for name, axes in (("split", ("a", "b")), ("shared", "b")):
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    held = held_rows(sharding, 8)
    told[name] = [own.tolist() for own in held]
    array = global_array(sharding, whole[held[index]], held[index], 8)
    assert not array.is_fully_addressable
    np.testing.assert_array_equal(host_value(array), whole)
print(json.dumps(told))
"""
FAILING = """
import jax
from audio_grpo.errors import UserError
from audio_grpo.parallel.processes import gather, start_processes

def make():
    if jax.process_index() == 1:
        raise {error}("the cause")

start_processes()
gather(make)
"""


def start_with(monkeypatch, variables):
    started = []
    for name in (ADDRESS, COUNT, INDEX, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: started.append(args))
    start_processes()
    return started


@pytest.mark.parametrize("variables", [{}, {"SLURM_NTASKS": "1"}, {ADDRESS: "h:1", COUNT: "1", INDEX: "0"}])
def test_a_process_alone_starts_nothing(monkeypatch, variables):
    assert start_with(monkeypatch, variables) == []


def test_the_variables_name_the_run_and_slurm_is_left_to_jax(monkeypatch):
    assert start_with(monkeypatch, {ADDRESS: "host:12", COUNT: "3", INDEX: "2"}) == [("host:12", 3, 2)]
    assert start_with(monkeypatch, {"SLURM_NTASKS": "4"}) == [()]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({COUNT: "2"}, "There is JAX_NUM_PROCESSES without JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        (
            {ADDRESS: "host:12", COUNT: "2"},
            "JAX_NUM_PROCESSES without JAX_PROCESS_ID",
        ),
        ({ADDRESS: "host", COUNT: "2", INDEX: "0"}, "JAX_COORDINATOR_ADDRESS is host: give host:port of process 0"),
        ({ADDRESS: "host:12", COUNT: "2", INDEX: "2"}, "JAX_NUM_PROCESSES is 2 and JAX_PROCESS_ID is 2: give"),
        ({ADDRESS: "host:12", COUNT: "two", INDEX: "0"}, "JAX_NUM_PROCESSES is two and"),
    ],
)
def test_variables_that_do_not_fit_together_are_refused(monkeypatch, variables, sentence):
    with pytest.raises(UserError, match=sentence):
        start_with(monkeypatch, variables)


def test_a_process_alone_is_the_first_and_has_everything():
    assert is_first()
    assert gather(lambda: {"a": 1}) == [{"a": 1}]
    assert share_out(3).tolist() == [0, 1, 2]
    assert host_value(jax.numpy.arange(3)).tolist() == [0, 1, 2]


class Device(SimpleNamespace):
    __hash__ = object.__hash__


@pytest.fixture
def three_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)


def sharded(*places):
    devices = {Device(process_index=process): (slice(*rows),) for process, rows in places}
    return SimpleNamespace(devices_indices_map=lambda _: devices, mesh=SimpleNamespace(size=len(devices)))


def test_rows_are_held_by_the_processes_whose_devices_have_them(three_processes):
    sharding = sharded((0, (4, 6)), (0, (0, 2)), (1, (2, 4)), (2, (2, 4)), (2, (6, None)))
    assert [own.tolist() for own in held_rows(sharding, 8)] == [[0, 1, 4, 5], [2, 3], [2, 3, 6, 7]]


def test_a_process_without_rows_is_refused_by_number(three_processes):
    with pytest.raises(UserError, match=r"Of 3 processes, the devices of \[1\] are not in the mesh of 2 devices"):
        held_rows(sharded((0, (0, 4)), (2, (4, 8))), 8)


def test_two_processes_know_of_each_other():
    ended = run_processes("-c", TOGETHER, devices=2, processes=2)
    assert [process.status for process in ended] == [0, 0], ended
    first, second = (json.loads(process.output.splitlines()[-1]) for process in ended)
    assert (first.pop("first"), second.pop("first")) == (True, False)
    assert np.concatenate([first.pop("share"), second.pop("share")]).tolist() == [0, 1, 2, 3, 4]
    assert first == second
    assert first["long"] == [1, 9001]
    assert first["split"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert first["shared"] == [list(range(8))] * 2


@pytest.mark.parametrize(("error", "others"), [("UserError", "UserError"), ("ValueError", "RuntimeError")])
def test_what_fails_in_one_process_ends_all(error, others):
    waiting, failing = run_processes("-c", FAILING.format(error=error), devices=1, processes=2)
    assert failing.status == waiting.status == 1
    assert f"{error}: the cause" in failing.errors
    assert f"{others}: In process 1:" in waiting.errors
    assert "the cause" in waiting.errors
