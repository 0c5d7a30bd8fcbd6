"""Measures every comparison, and prints or writes the results as a table."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from parity.cases import CASES, FRAMES

TOLERANCE = 1e-4

# The models are tiny: compiling them takes most of the time. Read by JAX when it first runs something.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

Agree = Callable[..., None]

_differences: dict[str, list[float]] = defaultdict(list)
_equal: dict[str, int] = defaultdict(int)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--table docs/parity.md` keeps the results."""
    parser.addoption("--table", type=Path, help="write the results to this Markdown file")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def agree(record_property: Callable[[str, object], None]) -> Agree:
    """Require that arrays differ by at most `TOLERANCE`, relative to the reference's largest value or to `scale`."""

    def check(quantity: str, ours: np.ndarray, reference: np.ndarray, scale: float | None = None) -> None:
        assert np.shape(ours) == np.shape(reference)
        difference = float(np.abs(ours - reference).max(initial=0) / (scale or np.abs(reference).max()))
        record_property(quantity, difference)
        assert difference <= TOLERANCE, f"{quantity} differs by {difference:.2e}"

    return check


@pytest.fixture
def equal(record_property: Callable[[str, object], None]) -> Agree:
    """Require that arrays of whole numbers are the same."""

    def check(quantity: str, ours: np.ndarray, reference: np.ndarray) -> None:
        np.testing.assert_array_equal(ours, reference, quantity)
        record_property(quantity, np.size(reference))

    return check


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect what was measured; this runs in the process that prints, whichever process ran the test."""
    if report.when == "call":
        for quantity, value in report.user_properties:
            if isinstance(value, int):
                _equal[quantity] += value
            else:
                _differences[quantity].append(value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and write it where asked."""
    lines = list(_table())
    terminalreporter.write_line("\n".join(lines))
    path: Path | None = config.getoption("--table")
    if path is not None:
        path.write_text("\n".join([*_preface(), *lines, ""]))


def _preface() -> Iterator[str]:
    yield "# Parity with the published implementation"
    yield ""
    yield (
        f"`make parity` compares {len(CASES)} models of random shapes and random weights (Qwen3-Omni's thinker with "
        f"experts and dense, Qwen3-ASR tied and untied) and {len(FRAMES)} clip lengths with transformers "
        f"{transformers.__version__} in float32 on a CPU. Differences are relative to the reference's largest value, "
        f"those of log-mel features and of log-probabilities absolute; the limit is {TOLERANCE:g}. "
        "The published log-mel computes spectra in float32, which is nearly all of that difference. "
        "`.parity/bin/python -m pytest parity --table docs/parity.md` writes this page."
    )
    yield ""


def _table() -> Iterator[str]:
    yield "| compared | arrays or values | largest difference |"
    yield "|---|---:|---:|"
    for quantity, values in sorted(_differences.items()):
        yield f"| {quantity} | {len(values)} arrays | {max(values):.1e} |"
    for quantity, count in sorted(_equal.items()):
        yield f"| {quantity} | {count} values | all equal |"
