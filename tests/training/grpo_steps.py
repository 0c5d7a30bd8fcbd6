"""GRPO runs of the tiny model in processes of their own, with as many CPU devices as one likes.

Tests call `grpo_runs`; each process runs this file, and prints what it knows of each step as a JSON line.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from several_processes import run_processes

_COMPARABLE = {"adam_eps": 1e-3, "learning_rate": 1e-2}
"""With a smaller epsilon Adam makes full-sized steps of gradients that are rounding alone, and runs drift apart."""


class Step(NamedTuple):
    """What one process knows of a step."""

    metrics: dict[str, float]
    tokens: list[list[list[int]]]
    """[B][G][C]"""
    clips: list[str]


class Runs(NamedTuple):
    """What one process knows of all runs."""

    steps: dict[str, list[Step]]
    """By the run's name."""
    errors: str
    """What it wrote on standard error."""


def grpo_runs(folder: Path, runs: Mapping[str, Mapping[str, Any]], *, devices: int, processes: int = 1) -> list[Runs]:
    """Train on `folder`/data once for each of `runs`, which are changes of `tiny_config` by name, one after another.

    Returns what every process, each of `devices` CPU devices, knows. Programs are kept in `folder`/programs.
    """
    ended = run_processes(__file__, str(folder), json.dumps(runs), devices=devices, processes=processes)
    for process in ended:
        if process.status:
            raise RuntimeError(process.errors)
    return [Runs(_steps(process.output, runs), process.errors) for process in ended]


def assert_alike(ours: list[Step], theirs: list[Step]) -> None:
    """The same clips and tokens, and the same metrics within float32's rounding."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one.clips, one.tokens) == (other.clips, other.tokens)
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4, abs=1e-4)


def _steps(output: str, names: Mapping[str, Any]) -> dict[str, list[Step]]:
    # Gloo tells of its connections on standard output too.
    told = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {name: [Step(**line["step"]) for line in told if line["run"] == name] for name in names}


def _run(folder: str, runs: str) -> None:
    from tiny_runs import MEASURED, TIMINGS, tiny_config

    from audio_grpo.training import grpo_loop, sampling

    step, sample, sampled = grpo_loop.grpo_step, sampling.sample, []

    def noting(*args: Any) -> Any:
        sampled.append(sample(*args))
        return sampled[-1]

    def telling(trainer: Any, engine: Any, rewards: Any, batch: dict[str, Any], number: int) -> Any:
        result = step(trainer, engine, rewards, batch, number)
        metrics = {
            name: value
            for name, value in result.metrics.items()
            if name not in TIMINGS and not name.startswith(MEASURED)
        }
        told = Step(metrics, sampled[-1].tokens.tolist(), batch["id"])
        print(json.dumps({"run": trainer.session.config.run_name, "step": told._asdict()}), flush=True)
        return result

    sampling.sample, grpo_loop.grpo_step = noting, telling
    shared = _COMPARABLE | {"jax_cache_dir": f"{folder}/programs"}
    for name, changes in json.loads(runs).items():
        grpo_loop.train_loop(tiny_config(Path(folder), run_name=name, **shared, **changes))


if __name__ == "__main__":
    _run(*sys.argv[1:])
