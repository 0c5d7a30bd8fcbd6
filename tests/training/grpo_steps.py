"""GRPO steps of the tiny model in processes of their own, with as many CPU devices as one likes.

Tests call `grpo_steps`; each process runs this file, and prints what it knows of each step as a JSON line.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from several_processes import run_processes


class Step(NamedTuple):
    """What one process knows of a step."""

    metrics: dict[str, float]
    tokens: list[list[list[int]]]
    """[B][G][C]"""
    clips: list[str]


def grpo_steps(folder: Path, *, devices: int, processes: int = 1, **changes: Any) -> list[list[Step]]:
    """Train on `folder`/data by `tiny_config` with `changes`; returns every process's steps.

    Each process has `devices` CPU devices. Programs are kept in `folder`/programs.
    """
    changes = {"jax_cache_dir": str(folder / "programs"), **changes}
    ended = run_processes(__file__, str(folder), json.dumps(changes), devices=devices, processes=processes)
    for process in ended:
        if process.status:
            raise RuntimeError(process.errors)
    # Gloo tells of its connections on standard output too.
    lines = [[line for line in process.output.splitlines() if line.startswith("{")] for process in ended]
    return [[Step(**json.loads(line)) for line in of_process] for of_process in lines]


def _run(folder: str, changes: str) -> None:
    from tiny_runs import TIMINGS, tiny_config

    from audio_grpo.training import grpo_loop

    step, sample, sampled = grpo_loop.grpo_step, grpo_loop.generate_completions, []

    def sampling(*args: Any) -> Any:
        sampled.append(sample(*args))
        return sampled[-1]

    def telling(trainer: Any, engine: Any, rewards: Any, batch: dict[str, Any], number: int) -> Any:
        result = step(trainer, engine, rewards, batch, number)
        metrics = {
            name: value
            for name, value in result.metrics.items()
            if name not in TIMINGS and not name.startswith("seconds/")
        }
        told = Step(metrics, sampled[-1].tokens.tolist(), batch["id"])
        print(json.dumps(told._asdict()), flush=True)
        return result

    grpo_loop.generate_completions, grpo_loop.grpo_step = sampling, telling
    grpo_loop.train_loop(tiny_config(Path(folder), **json.loads(changes)))


if __name__ == "__main__":
    _run(*sys.argv[1:])
