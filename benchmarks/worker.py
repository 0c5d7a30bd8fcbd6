"""A side of a comparison as a process of its own: jobs come as JSON lines, answers go as JSON lines."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FOLDER = Path(__file__).parent
Job = Callable[..., dict[str, Any]]


class Side:
    """A running side, asked one job at a time."""

    def __init__(self, python: Path, script: str, **arguments: Any) -> None:
        """`script` lies beside this file and calls `serve`; `arguments` are what it starts with."""
        command = [str(python), str(FOLDER / script), json.dumps(arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._name = script

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def ask(self, job: str, **arguments: Any) -> dict[str, Any]:
        """What the side answers.

        Raises:
            RuntimeError: it ended without an answer; its own message is on standard error.
        """
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"job": job, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._name} ended during {job} with status {self._process.wait()}.")
        return json.loads(answer)


def serve(start: Callable[..., Mapping[str, Job]]) -> None:
    """Build the side from its arguments, then answer jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    jobs = start(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(jobs[task["job"]](**task["arguments"])), file=answers, flush=True)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that it took, and what it gave."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def peak_bytes() -> int:
    """Most memory that this process has had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
