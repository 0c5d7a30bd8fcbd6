import io
import sys

import pytest

from audio_grpo.training.progress import Progress


class Clock:
    def __init__(self, seconds_per_step: float):
        self.now, self.seconds_per_step = 0.0, seconds_per_step

    def __call__(self) -> float:
        return self.now


def run_phase(steps: int, seconds_per_step: float, done: int = 0, **metrics: float) -> list[str]:
    stream, clock = io.StringIO(), Clock(seconds_per_step)
    with Progress("grpo", steps, done=done, stream=stream, clock=clock) as progress:
        for step in range(done + 1, steps + 1):
            clock.now += seconds_per_step
            progress.update(step, metrics)
    return stream.getvalue().splitlines()


def told_steps(lines: list[str]) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in lines]


def test_a_short_run_tells_every_step():
    assert told_steps(run_phase(10, 0.1)) == list(range(1, 11))


def test_a_long_fast_run_tells_the_first_ten_steps_then_each_two_percent():
    assert told_steps(run_phase(1000, 0.001)) == [*range(1, 11), *range(30, 1000, 20), 1000]


def test_a_slow_run_tells_at_least_each_ten_seconds():
    assert told_steps(run_phase(1000, 6.0))[10:14] == [12, 14, 16, 18]


def test_a_resumed_run_tells_its_own_first_steps():
    assert told_steps(run_phase(1000, 0.001, done=500))[:12] == [*range(501, 511), 530, 550]


def test_a_line_has_what_the_step_measured():
    line = run_phase(3, 2.0, reward=1.25, wer=0.4567, tokens_per_second=1234.5, kl=0.1)[1]
    assert line == "grpo 2/3  reward 1.250  WER 45.7%  1,234 tokens/s  ETA 0:02"


def test_the_time_left_leaves_the_first_step_out_since_it_compiles():
    stream, clock = io.StringIO(), Clock(0)
    with Progress("sft", 4000, stream=stream, clock=clock) as progress:
        for step, now in ((1, 90.0), (2, 92.0), (3, 94.0)):
            clock.now = now
            progress.update(step, {})
    etas = [line.split("ETA ")[1] for line in stream.getvalue().splitlines()]
    assert etas == ["–", "2:13:16", "2:13:14"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_standard_output_stays_free(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    with Progress("grpo", 5, stream=terminal) as progress:
        progress.update(5, {"reward": 1.25, "wer": 0.5})
        print("a result", file=sys.stdout)
    assert capsys.readouterr().out == "a result\n"
    assert "5/5" in terminal.getvalue()
    assert "reward 1.250" in terminal.getvalue()
    assert "a result" not in terminal.getvalue()


def test_an_exception_ends_the_bar_and_passes():
    with pytest.raises(KeyError), Progress("grpo", 5, stream=Terminal()):
        raise KeyError("step")
