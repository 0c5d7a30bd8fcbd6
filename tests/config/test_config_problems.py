"""All that is wrong with a configuration is said at once, with what to do about it."""

import sys
from pathlib import Path

import pytest

from audio_grpo.config import Config, load_config
from audio_grpo.config.problems import what_it_takes
from audio_grpo.errors import UserError


def problems_of(source: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(source, overrides)
    return str(caught.value).splitlines()[1:]


def file_with(folder: Path, text: str) -> str:
    path = folder / "mine.yml"
    path.write_text(text)
    return str(path)


def test_unknown_keys_wrong_values_and_contradictions_are_reported_together(tmp_path: Path) -> None:
    source = file_with(tmp_path, "num_generatoins: 4\nsteps: ten\nmax_prefill_predict_length: 300\nadam_b1: 7\n")
    problems = problems_of(source, "num_kv_heads=3", "nonsense")
    assert len(problems) == 6
    text = "\n".join(problems)
    assert "num_generatoins: 4 (in " in text
    assert "the nearest is num_generations, which takes a whole number above 0" in text
    assert "steps: 'ten' (in " in text
    assert "adam_b1: 7 (in " in text
    assert "takes a number from 0 up to 1" in text
    assert "max_prefill_predict_length 300 leaves no room" in text
    assert "num_query_heads 4 is not a multiple of num_kv_heads 3" in text
    assert "nonsense (on the command line)" in text


def test_a_key_at_fault_contradicts_nothing(tmp_path: Path) -> None:
    source = file_with(tmp_path, "max_target_length: long\nmax_prefill_predict_length: 300\n")
    (problem,) = problems_of(source)
    assert problem.startswith("- max_target_length: 'long'")


@pytest.mark.parametrize(
    ("override", "takes"),
    [
        ("steps=2.5", "a whole number above 0"),
        ("steps=true", "a whole number above 0"),
        ("steps='7'", "a whole number above 0"),
        ("learning_rate=fast", "a number from 0"),
        ("learning_rate=.nan", "a number from 0"),
        ("learning_rate=.inf", "a number from 0"),
        ("use_grpo=1", "true or false"),
        ("run_name=7", "text (in quotes where it looks like a number)"),
        ("solution_end_token=''", "text that is not empty"),
        ("template=chat", "'reasoning' or 'transcript' or 'qwen3-asr'"),
        ("reward_weights=[1, x]", "a list (each entry a number) or null"),
        ("reward_functions=asr_wer_reward", "a list (each entry text"),
        ("enable_dropout=true", "only false. The published models have none."),
    ],
)
def test_a_wrong_value_is_told_what_its_key_takes(override: str, takes: str) -> None:
    key, _, _ = override.partition("=")
    (problem,) = problems_of("base", override)
    assert problem.startswith(f"- {key}: ")
    assert takes in problem


def test_every_key_can_saywhat_it_takes() -> None:
    assert all(what_it_takes(key) for key in Config.model_fields)


def test_a_key_like_no_other_has_no_nearest_one() -> None:
    (problem,) = problems_of("base", "zzzqqq=1")
    assert "there is no such key; `audio-grpo config`" in problem


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["num_experts=4", "num_experts_per_tok=8"], "num_experts_per_tok 8 exceeds num_experts 4"),
        (["num_generations=1"], "num_generations 1"),
        (["router_replay=true"], "router_replay has no experts to choose again"),
        (["router_aux_loss_coef=0.1", "freeze_router_params=false"], "router to teach: num_experts is 0"),
        (["router_aux_loss_coef=0.1", "num_experts=8"], "8 and freeze_router_params true, so leave it out"),
        (["min_completion_length=500"], "min_completion_length 500"),
        (["decode_sampling_strategy=greedy"], "decode_sampling_strategy greedy"),
        (["reward_weights=[1]"], "reward_weights has 1 entries for 2"),
        (["audio_min_seconds=5", "audio_max_seconds=2"], "audio_min_seconds 5"),
        (["ici_data_parallelism=-1"], "ici_data_parallelism, ici_fsdp_parallelism are all -1"),
        (["output_dim_for_audio=7"], "output_dim_for_audio 7 must equal emb_dim 256"),
        (["train_data_columns=[]"], "train_data_columns is empty"),
        (["solution_start_token=<reasoning>"], "four different texts"),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides: list[str], sentence: str) -> None:
    (problem,) = problems_of("base", *overrides)
    assert sentence in problem


def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    (problem,) = problems_of(file_with(tmp_path, "steps: 1\nseed: 2\nsteps: 3\n"))
    assert problem.startswith("- steps (in ")
    assert problem.endswith("stands 2 times: keep one")


def test_an_override_that_is_given_twice_is_refused() -> None:
    assert problems_of("base", "steps=1", "steps=2") == [
        "- steps (on the command line) is given more than once: keep one"
    ]


def test_base_config_is_no_override() -> None:
    (problem,) = problems_of("base", "base_config=tiny.yml")
    assert "can stand only in a file" in problem


def test_an_override_that_is_no_yaml_is_refused_with_the_others() -> None:
    problems = problems_of("base", "instruction=[", "steps=0")
    assert len(problems) == 2
    assert "instruction=[ (on the command line) is not valid YAML" in problems[0]


@pytest.mark.parametrize("override", ["solution_end_token=#", "instruction=write # nothing"])
def test_an_override_loses_nothing_to_a_comment(override: str) -> None:
    (problem,) = problems_of("base", override)
    assert problem.endswith("would be a comment; quote the value")


def test_an_unknown_model_names_the_nearest_preset() -> None:
    (problem,) = problems_of("base", "model_name=qwen3-omni-30b")
    assert "there is no qwen3-omni-30b.yml beside" in problem
    assert "the nearest preset is qwen3-omni-30b-a3b" in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1\nseed: 2", "is not valid YAML: line 2"),
        ("- steps\n- 3\n", "holds no keys"),
        ("just words", "holds no keys"),
        ("when: 2024-13-45", "is not valid YAML"),
        ("base_config: nowhere.yml", "there is no"),
        ("base_config: mine.yml", "leads back to itself"),
        ("base_config: 3", "it names one file"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=r"mine\.yml") as caught:
        load_config(file_with(tmp_path, text))
    assert message in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_bytes(b"\xff\xfe\xfa steps: 1")
    with pytest.raises(UserError, match="cannot be read as text"):
        load_config(str(path))


def test_a_base_config_cycle_over_folders_is_found(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "other.yml").write_text("base_config: ../mine.yml")
    with pytest.raises(UserError, match="leads back to itself"):
        load_config(file_with(tmp_path, "base_config: deep/other.yml"))


def test_an_unknown_configuration_names_the_nearest_preset() -> None:
    with pytest.raises(UserError, match=r"'tinny', and no preset of that name\. The nearest preset is tiny\."):
        load_config("tinny")


def test_remote_paths_ask_for_the_library_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"install audio-grpo\[remote\]"):
        load_config("gs://bucket/recipe.yml")
