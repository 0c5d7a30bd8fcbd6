"""Reward functions by name, and the table of what a batch of completions earned.

A reward function is called by keyword, as TRL calls it: `prompts`, `completions`, `completion_ids`, every column of the
batch (one entry for each completion), `config` and, for MaxText's functions, `tmvp_config`. It must accept further
keywords and returns one float for each completion. Training calls it with the completions of one prompt at a time, as
soon as they are there, from a thread beside its own.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.rewards.asr import asr_cer_reward, asr_format_reward, asr_wer_reward
from audio_grpo.rewards.overlong import soft_overlong_punishment_reward

_BUILT_IN: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (asr_wer_reward, asr_cer_reward, asr_format_reward, soft_overlong_punishment_reward)
}
_OURS = frozenset({"prompts", "completions", "completion_ids", "config", "tmvp_config"})


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A function and the name that its metrics bear."""

    name: str
    """E.g. "asr_wer_reward"."""
    function: Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTable:
    """What each of G completions of B prompts earned from each of R functions."""

    names: tuple[str, ...]
    values: Float32[np.ndarray, "R B G"]
    """Before weighting."""

    def total(self, weights: Sequence[float] | None = None) -> Float32[np.ndarray, "B G"]:
        """The functions' sum, weighted by one number for each function; None weighs them equally with 1."""
        weight = np.ones(len(self.names)) if weights is None else np.asarray(weights)
        return np.tensordot(weight, self.values, axes=1).astype(np.float32)

    def first(self, count: int) -> "RewardTable":
        """That of each prompt's first `count` completions."""
        return RewardTable(names=self.names, values=self.values[..., :count])


def resolve_reward(name_or_path: str) -> RewardFunction:
    """The function that a configuration names.

    Args:
        name_or_path: a built-in name, `module:function`, or `file.py:function`.

    Raises:
        UserError: there is no such function. What a module raises while it is imported comes through.
    """
    if name_or_path in _BUILT_IN:
        return RewardFunction(name_or_path, _BUILT_IN[name_or_path])
    place, colon, name = name_or_path.rpartition(":")
    if not colon:
        raise UserError(
            f"There is no reward function {name_or_path!r}: give {', '.join(_BUILT_IN)}, module:function or "
            "file.py:function"
        )
    module = _load_file(place) if place.endswith(".py") else _import(place)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UserError(f"{place} has no function {name!r}, but these names: {', '.join(own) or 'none'}")
    return RewardFunction(name, function)


def score_completions(
    functions: Sequence[RewardFunction],
    *,
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    completion_ids: Sequence[Sequence[Sequence[int]]],
    columns: Mapping[str, Sequence[Any]],
    config: Config,
    must_be_finite: bool = True,
) -> RewardTable:
    """Calls each function once with all completions.

    Args:
        functions: R functions.
        prompts: B decoded prompts.
        completions: for each prompt its G completions, decoded without special tokens.
        completion_ids: their token ids, stop tokens included.
        columns: the batch's further columns, B entries each, e.g. {"ground_truth_text": ["seven blue lamps", ...]}.
        config: passed on.
        must_be_finite: whether NaN and infinity are refused; training skips the update that they would spoil.

    Raises:
        UserError: two functions share a name, or one does not return a float for each completion. What a function
            raises comes through, with a note that names it.
    """
    names = tuple(function.name for function in functions)
    if len(set(names)) < len(names):
        raise UserError(f"reward_functions are {', '.join(names)}: give each a name of its own, which its metrics bear")
    taken = _OURS.intersection(columns)
    if taken:
        raise UserError(
            f"Columns are named {', '.join(sorted(taken))}, as reward functions' own keywords are: rename them"
        )
    generations = len(completions[0])
    keywords = {name: _repeated(name, column, len(prompts), generations) for name, column in columns.items()}
    keywords |= {
        "prompts": _repeated("prompts", prompts, len(prompts), generations),
        "completions": [completion for group in completions for completion in group],
        "completion_ids": [ids for group in completion_ids for ids in group],
        "config": config,
        "tmvp_config": config,
    }
    values = np.array([_call(function, keywords, must_be_finite) for function in functions], np.float32)
    return RewardTable(names=names, values=values.reshape(len(functions), len(prompts), generations))


def _repeated(name: str, column: Sequence[Any], rows: int, generations: int) -> list[Any]:
    if len(column) != rows:
        raise ValueError(f"Column {name} has {len(column)} entries for {rows} prompts")
    return [entry for entry in column for _ in range(generations)]


def _call(reward: RewardFunction, keywords: Mapping[str, Any], must_be_finite: bool) -> list[float]:
    try:
        returned = reward.function(**keywords)
    except Exception as error:
        error.add_note(
            f"This was raised in the reward function {reward.name}, called with the keywords {', '.join(keywords)}; it "
            "must accept all of them (**kwargs)."
        )
        raise
    count = len(keywords["completions"])
    if not hasattr(returned, "__len__") or len(returned) != count:
        given = f"{len(returned)} values" if hasattr(returned, "__len__") else f"a {type(returned).__name__}"
        raise UserError(
            f"The reward function {reward.name} returned {given} for {count} completions: return one float each"
        )
    return [_number(reward.name, row, value, must_be_finite) for row, value in enumerate(returned)]


def _number(name: str, row: int, value: Any, must_be_finite: bool) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or (must_be_finite and not math.isfinite(number)):
        raise UserError(f"The reward function {name} returned {value!r} for completion {row}: return a finite float")
    return number


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"There is no module {name!r} to take a reward function from: install it, or give file.py:function"
        ) from error


def _load_file(name: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"There is no file {name!r} to take a reward function from")
    spec = importlib.util.spec_from_file_location(f"reward file {path}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look their module up there
    spec.loader.exec_module(module)
    return module
