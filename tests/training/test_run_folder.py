import json

import jax
import pytest

from audio_grpo.errors import UserError
from audio_grpo.training.evaluation_report import ErrorRates, EvaluationReport
from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.run_folder import RunFolder


def evaluation(stage: str, step: int, deletions: int = 0) -> EvaluationReport:
    rates = ErrorRates(
        clips=1,
        reference_words=10,
        substitutions=0,
        deletions=deletions,
        insertions=0,
        reference_characters=40,
        cer_edits=0,
    )
    return EvaluationReport(stage=stage, step=step, text_normalizer="basic", text_normalizer_version="1", rates=rates)


def test_a_created_run_opens_once_it_has_a_configuration(tmp_path):
    run = RunFolder.create(str(tmp_path), "first")
    with pytest.raises(UserError, match=r"first is not the folder of a run: it has no config\.yml"):
        RunFolder.open(run.path)
    run.config_path.write_text("steps: 3\n")
    assert RunFolder.open(str(tmp_path / "first")) == run
    assert RunFolder.create(str(tmp_path), "first").config_path.read_text() == "steps: 3\n"


def test_a_folder_in_the_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (tmp_path / "runs" / "first").is_dir() is False
    RunFolder.create("~/runs", "first")
    assert (tmp_path / "runs" / "first").is_dir()


def test_every_file_of_a_run_lies_in_its_folder(tmp_path):
    run = RunFolder.create(str(tmp_path), "first")
    paths = [
        run.config_path, run.environment_path, run.metrics_path, run.completions_path, run.evaluations_path,
        run.checkpoints, run.tensorboard, run.clips, run.report_path,
    ]  # fmt: skip
    assert {path.parent for path in paths} == {run.path}
    assert len({path.name for path in paths}) == len(paths)


def test_the_environment_names_devices_and_versions(tmp_path):
    run = RunFolder.create(str(tmp_path), "first")
    run.write_environment("4 × TPU v4")
    noted = json.loads(run.environment_path.read_text())
    assert noted["devices"] == "4 × TPU v4"
    assert noted["versions"]["jax"] == jax.__version__


def test_evaluations_that_a_resumed_run_repeats_replace_the_earlier_ones(tmp_path):
    run = RunFolder.create(str(tmp_path), "first")
    before = [evaluation("sft", 30), evaluation("grpo", 5), evaluation("grpo", 10, 5), evaluation("grpo", 20)]
    for report in [*before, evaluation("grpo", 10, 2)]:
        run.write_evaluation(report)
    records = JsonLinesFile(run.evaluations_path).read().records
    assert [(each["stage"], each["step"], each["deletions"]) for each in records] == [
        ("sft", 30, 0),
        ("grpo", 5, 0),
        ("grpo", 10, 2),
    ]
