"""A side of a comparison as a process of its own: jobs come as JSON lines, answers go as JSON lines."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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


class Talk:
    """A side's own end: what it starts with, the jobs that it is asked, its answers."""

    def __init__(self) -> None:
        """Takes standard output for the answers."""
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        self.arguments: dict[str, Any] = json.loads(sys.argv[1])

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and arguments of jobs, each once it is asked for, until there are no more."""
        for line in sys.stdin:
            task = json.loads(line)
            yield task["job"], task["arguments"]

    def answer(self, told: dict[str, Any]) -> None:
        """Answer the newest job."""
        print(json.dumps(told), file=self._answers, flush=True)


def serve(start: Callable[..., Mapping[str, Job]]) -> None:
    """Build the side from its arguments, then answer jobs until there are no more."""
    talk = Talk()
    jobs = start(**talk.arguments)
    for job, arguments in talk:
        talk.answer(jobs[job](**arguments))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that it took, and what it gave."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def peak_bytes() -> int:
    """Most memory that this process has had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
