"""User functions are found, called once, and held to their contract."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.rewards import RewardFunction, RewardTable, asr_wer_reward, resolve_reward, score_completions

PROMPTS = ["p0", "p1"]
COMPLETIONS = [["a", "bb", "ccc"], ["d", "ee", "fff"]]
IDS = [[[5], [5, 6], [5, 6, 7]], [[8], [8, 9], []]]
COLUMNS = {"ground_truth_text": ["a", "fff"], "speaker": [7, 8]}


def table_of(
    *functions: Callable[..., Any], columns: dict[str, Any] = COLUMNS, must_be_finite: bool = True
) -> RewardTable:
    named = [RewardFunction(getattr(function, "__name__", "unnamed"), function) for function in functions]
    return score_completions(
        named,
        prompts=PROMPTS,
        completions=COMPLETIONS,
        completion_ids=IDS,
        columns=columns,
        config=Config(),
        must_be_finite=must_be_finite,
    )


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def test_a_function_written_for_trl_works_unchanged() -> None:
    table = table_of(length)
    assert table.names == ("length",)
    np.testing.assert_array_equal(table.values, [[[1, 2, 3], [1, 2, 3]]])
    assert table.values.dtype == np.float32


def test_each_function_is_called_once_with_every_column_repeated() -> None:
    calls: list[dict[str, Any]] = []

    def spy(**keywords: Any) -> list[float]:
        calls.append(keywords)
        return [0.0] * 6

    table_of(spy)
    (keywords,) = calls
    assert keywords["prompts"] == ["p0"] * 3 + ["p1"] * 3
    assert keywords["completions"] == ["a", "bb", "ccc", "d", "ee", "fff"]
    assert keywords["completion_ids"] == [[5], [5, 6], [5, 6, 7], [8], [8, 9], []]
    assert keywords["ground_truth_text"] == ["a"] * 3 + ["fff"] * 3
    assert keywords["speaker"] == [7, 7, 7, 8, 8, 8]
    assert keywords["config"] is keywords["tmvp_config"]
    assert keywords["config"] == Config()


def test_totals_are_weighted_sums() -> None:
    def ones(completions: list[str], **kwargs: Any) -> np.ndarray:
        return np.ones(len(completions))

    table = table_of(length, ones)
    np.testing.assert_array_equal(table.total(), [[2, 3, 4], [2, 3, 4]])
    np.testing.assert_array_equal(table.total([0.5, -1]), [[-0.5, 0, 0.5], [-0.5, 0, 0.5]])


def test_built_in_rewards_are_found_by_name() -> None:
    assert resolve_reward("asr_wer_reward") == RewardFunction("asr_wer_reward", asr_wer_reward)


def test_a_module_gives_its_function() -> None:
    assert resolve_reward("audio_grpo.rewards.asr:asr_wer_reward").function is asr_wer_reward


def test_a_file_gives_its_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        from __future__ import annotations
        from dataclasses import dataclass

        @dataclass
        class Bonus:
            amount: float = 2.5

        def brevity(completions, **kwargs):
            return [Bonus().amount - len(completion) for completion in completions]
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(code))
    monkeypatch.chdir(tmp_path)
    for place in ("mine.py", str(tmp_path / "mine.py")):
        reward = resolve_reward(f"{place}:brevity")
        assert reward.name == "brevity"
        assert reward.function(completions=["abc"]) == [-0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("asr_wer", "There is no reward function 'asr_wer': give asr_wer_reward, "),
        ("no_such_module:f", "There is no module 'no_such_module'"),
        ("audio_grpo.no_such.module:f", "There is no module 'audio_grpo.no_such.module'"),
        ("audio_grpo.rewards.asr:nothing", "has no function 'nothing', but these names: asr_wer_reward"),
        ("nowhere/mine.py:f", "There is no file 'nowhere/mine.py'"),
    ],
)
def test_a_function_that_does_not_exist_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_reward(name)
    assert message in str(caught.value)


def test_a_missing_import_inside_the_users_file_is_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        resolve_reward(f"{tmp_path / 'broken.py'}:f")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "returned 2 values for 6 completions"),
        (3.0, "returned a float for 6 completions"),
        (None, "returned a NoneType"),
        ([0, 1, 2, None, 4, 5], "returned None for completion 3"),
        ([0, float("nan"), 2, 3, 4, 5], "returned nan for completion 1"),
        ([0, 1, 2, 3, 4, float("inf")], "returned inf for completion 5"),
        ([0, 1, "good", 3, 4, 5], "returned 'good' for completion 2"),
    ],
)
def test_anything_but_a_finite_float_each_is_refused(returned: object, message: str) -> None:
    def odd(**kwargs: Any) -> object:
        return returned

    with pytest.raises(UserError) as caught:
        table_of(length, odd)
    assert "reward function odd" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_training_gets_what_is_not_finite_and_refuses_what_is_no_number(number: float) -> None:
    def odd(**kwargs: Any) -> object:
        return [number, 0, 1, 2, 3, last]

    last: object = 4
    assert table_of(odd, must_be_finite=False).values.ravel().tolist()[1:] == [0, 1, 2, 3, 4]
    last = None
    with pytest.raises(UserError, match="returned None for completion 5"):
        table_of(odd, must_be_finite=False)


def test_what_a_function_raises_comes_through_with_its_name() -> None:
    def failing(**kwargs: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(KeyError) as caught:
        table_of(failing)
    (note,) = caught.value.__notes__
    assert "reward function failing" in note
    assert "ground_truth_text" in note


def test_a_function_that_takes_no_further_keywords_is_told_so() -> None:
    def narrow(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(TypeError) as caught:
        table_of(narrow)
    assert "**kwargs" in caught.value.__notes__[0]


def test_two_functions_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="length, length"):
        table_of(length, length)


def test_columns_must_fit_and_may_not_take_a_reward_functions_keyword() -> None:
    with pytest.raises(UserError, match="Columns are named config"):
        table_of(length, columns={"config": [1, 2]})
    with pytest.raises(ValueError, match="Column speaker has 1 entries for 2 prompts"):
        table_of(length, columns={"speaker": [1]})
