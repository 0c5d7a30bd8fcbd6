"""Where a step's time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by phase; those of a phase that comes several times add up."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times what is done within, e.g. `with watch("rollout"): ...`."""
        started = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    @property
    def metrics(self) -> dict[str, float]:
        """E.g. {"seconds/rollout": 1.5}."""
        return {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
