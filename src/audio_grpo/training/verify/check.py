"""One line of the checklist: what was measured, and whether it is as it should be."""

import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from audio_grpo.model.spec import ThinkerSpec

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How far log-probabilities that two programs compute of the same tokens may lie apart."""

    token: float
    """Of a single token."""
    mean: float
    """Mean over tokens."""
    dtype: str


_ROUNDING: Mapping[str, Rounding] = {
    "float32": Rounding(token=1e-4, mean=1e-4, dtype="float32"),
    # A logit of 16 is rounded by up to 0.03, and now and then a token is sent to another expert: single tokens may
    # differ visibly, but not many.
    "bfloat16": Rounding(token=0.5, mean=0.02, dtype="bfloat16"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line."""

    name: str
    """E.g. "sampler and learner agree"."""
    passed: bool
    measured: str
    """E.g. "largest gap 1.2e-06 over 512 tokens; at most 0.0001 is asked in float32"."""


class Finding(NamedTuple):
    """What a check found."""

    passed: bool
    measured: str


def line(name: str, measure: Callable[[], Finding]) -> Check:
    """The finding under its name; a check that can not be made has failed, and says what was raised."""
    try:
        return Check(name, *measure())
    except Exception as error:
        return Check(name, False, _sentence(error))


def attempt(make: Callable[[], Value]) -> Future[Value]:
    """Something that several checks look at, made once; where that raised, each of them raises the same."""
    future: Future[Value] = Future()
    try:
        future.set_result(make())
    except Exception as error:
        future.set_exception(error)
    return future


def rounding(spec: ThinkerSpec) -> Rounding:
    """What rounding explains at the model's precision."""
    return _ROUNDING[spec.dtype]


def span(values: ArrayLike, unit: str = "") -> str:
    """Smallest and largest of an array, e.g. "31 to 38 tokens"."""
    array = np.asarray(values)
    return f"{array.min():.4g} to {array.max():.4g}{unit and ' ' + unit}"


def _sentence(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    notes = getattr(error, "__notes__", [])
    return " ".join(
        [f"raised {type(error).__name__} in {frame.name}, {frame.filename}:{frame.lineno}: {error}", *notes]
    )
