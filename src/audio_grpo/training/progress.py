"""How far a phase is, on standard error: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

_STEPS_TOLD_SINGLY = 10
_SHARE_BETWEEN_LINES = 0.02
_SECONDS_BETWEEN_LINES = 10.0
_STEPS_TIMED = 20

_SHOWN: Mapping[str, Callable[[float], str]] = {
    "reward": lambda value: f"reward {value:.3f}",
    "loss": lambda value: f"loss {value:.4f}",
    "wer": lambda value: f"WER {value:.1%}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
}
"""Metrics that are shown where a step has them."""


class Progress:
    """Shows step, reward, loss, WER, tokens/s and the time left while a phase runs; use it in a `with`.

    Plain lines come for each of the first 10 steps, then after 2 % of the steps or 10 s, and for the last step.
    """

    def __init__(
        self,
        phase: str,
        steps: int,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts at `done` of `steps` steps.

        Args:
            phase: Shown first, e.g. "grpo".
            steps: Steps of the whole phase.
            done: Steps done before, in a resumed run.
            stream: Where to; standard error if None.
            clock: Seconds that only rise.
        """
        self._phase, self._steps, self._done, self._clock = phase, steps, done, clock
        self._stream = stream or sys.stderr
        self._told_step, self._told_time = done, clock()
        self._times: deque[tuple[int, float]] = deque(maxlen=_STEPS_TIMED + 1)
        # Rich would otherwise send standard output, where results go, to its own stream.
        self._bar = (
            Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                console=Console(file=self._stream),
                redirect_stdout=False,
            )
            if self._stream.isatty()
            else None
        )

    def __enter__(self) -> Self:
        if self._bar:
            self._task = self._bar.add_task(self._phase, total=self._steps, completed=self._done, status="compiling")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells that `step` is done, with its metrics."""
        self._times.append((step, self._clock()))
        shown = [show(metrics[name]) for name, show in _SHOWN.items() if name in metrics]
        status = "  ".join([*shown, f"ETA {self._time_left()}"])
        if self._bar:
            self._bar.update(self._task, completed=step, status=status)
        elif self._is_due(step):
            self._told_step, self._told_time = step, self._clock()
            print(f"{self._phase} {step}/{self._steps}  {status}", file=self._stream, flush=True)

    def _is_due(self, step: int) -> bool:
        return (
            step - self._done <= _STEPS_TOLD_SINGLY
            or step == self._steps
            or step - self._told_step >= _SHARE_BETWEEN_LINES * self._steps
            or self._clock() - self._told_time >= _SECONDS_BETWEEN_LINES
        )

    def _time_left(self) -> str:
        """From the last steps' pace; the first one is not timed, since it compiles."""
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step == first_step:
            return "–"
        seconds = round((self._steps - last_step) * (last_time - first_time) / (last_step - first_step))
        minutes, hours = seconds // 60 % 60, seconds // 3600
        return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
