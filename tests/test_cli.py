import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_grpo.cli import main
from audio_grpo.config import load_config
from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.run_folder import RunFolder

HEAVY = ("jax", "grain", "orbax", "optax")
SMALL = (
    "num_decoder_layers=1", "emb_dim=32", "num_query_heads=4", "num_kv_heads=2", "head_dim=8", "mlp_dim=48",
    "d_model_for_audio=16", "encoder_layers_for_audio=1", "encoder_attention_heads_for_audio=2",
    "encoder_ffn_dim_for_audio=32", "downsample_hidden_size_for_audio=4", "output_dim_for_audio=32",
    "num_generations=2", "per_device_batch_size=1", "max_slots=8", "steps=2", "jax_cache_dir=''",
)  # fmt: skip
"""Makes the preset `tiny` smaller still."""


@dataclasses.dataclass
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["audio-grpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            main()
        captured = capsys.readouterr()
        return Outcome(leaving.value.code or 0, captured.out, captured.err)

    return run


def in_a_process(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "audio_grpo", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def modules_loaded_by(*arguments):
    program = (
        "import sys\n"
        "from audio_grpo.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "tones"
    done = in_a_process("data", "synthesize", folder, "--kind", "tones", "--count", 9, "--seed", 3)
    assert (done.status, done.out, done.err) == (0, f"{folder}: 9 clips\n", "")
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config", "tiny"]])
def test_what_needs_no_model_starts_without_jax(arguments):
    assert not modules_loaded_by(*arguments) & set(HEAVY)


def test_data_is_inspected_without_jax(tones):
    assert not modules_loaded_by("data", "inspect", tones) & set(HEAVY)


def test_help_names_every_verb(command):
    done = command("--help")
    assert done.status == 0
    for verb in ("train", "sft", "evaluate", "verify", "config", "report", "data"):
        assert f" {verb} " in done.out


def test_a_wrong_key_is_told_in_one_message_with_the_nearest_one():
    done = in_a_process("config", "tiny", "learning_rat=1e-3", "steps=many")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("audio-grpo: The configuration tiny has 2 problems:\n")
    assert "learning_rat" in done.err
    assert "learning_rate" in done.err.replace("learning_rat=", "")
    assert "steps" in done.err
    assert "Traceback" not in done.err


def test_a_configuration_that_is_nowhere_is_told_with_the_presets(command):
    done = command("train", "tinny")
    assert (done.status, done.out) == (2, "")
    assert "tinny" in done.err
    assert "tiny" in done.err.replace("tinny", "")


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_training_without_data_is_refused(command, verb, tmp_path):
    done = command(verb, "tiny", *SMALL, f"base_output_directory={tmp_path}")
    assert (done.status, done.out) == (2, "")
    assert "grain_train_files is not set" in done.err
    missing = command(verb, "tiny", *SMALL, f"base_output_directory={tmp_path}", "grain_train_files=/nowhere/data")
    assert (missing.status, missing.out) == (2, "")
    assert "/nowhere/data" in missing.err
    assert list(tmp_path.iterdir()) == []


def test_evaluating_without_data_is_refused(command, tmp_path):
    done = command("evaluate", "tiny", *SMALL, f"base_output_directory={tmp_path}")
    assert (done.status, done.out) == (2, "")
    assert "grain_eval_files is not set" in done.err


def test_a_report_on_no_run_is_refused(command, tmp_path):
    done = command("report", tmp_path)
    assert (done.status, done.out) == (2, "")
    assert f"{tmp_path} is not the folder of a run" in done.err


def test_a_configuration_is_printed_as_a_file_that_says_the_same(command, tmp_path):
    printed = command("config", "tiny", "steps=7", "grain_train_files=/some/where")
    assert (printed.status, printed.err) == (0, "")
    file = tmp_path / "resolved.yml"
    file.write_text(printed.out)
    assert load_config(str(file)) == load_config("tiny", ["steps=7", "grain_train_files=/some/where"])
    assert command("config", file).out == printed.out


def test_synthesised_data_is_inspected(command, tones):
    shown = command("data", "inspect", tones)
    assert shown.status == 0
    assert shown.out.startswith("9 records, ")
    summary = json.loads(command("data", "inspect", tones, "--json").out)
    assert summary["records"] == 9
    assert summary["languages"]["English"]["records"] == 9
    assert 1 <= summary["seconds_percentiles"]["p0"] <= summary["seconds_percentiles"]["p100"] <= 3


def test_nothing_is_synthesised_over_what_is_there(command, tones):
    before = sorted(tones.iterdir())
    done = command("data", "synthesize", tones, "--kind", "tones")
    assert (done.status, done.out) == (2, "")
    assert "not an empty folder" in done.err
    assert sorted(tones.iterdir()) == before


def test_a_manifest_is_packed_and_inspected(command, tmp_path):
    rows = []
    for number, seconds in enumerate((0.5, 1.5)):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(round(seconds * 8_000)), 8_000)
        rows.append(json.dumps({"audio": f"{number}.wav", "text": f"clip {number}", "language": "German"}))
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(rows) + "\n")
    packed = command("data", "pack", manifest, tmp_path / "packed", "--shards", 2)
    assert (packed.status, packed.out) == (0, f"{tmp_path / 'packed'}: 2 records\n")
    assert len(list((tmp_path / "packed").glob("*.arrayrecord"))) == 2
    summary = json.loads(command("data", "inspect", tmp_path / "packed", "--json").out)
    assert summary["records"] == 2
    assert summary["hours"] * 3600 == pytest.approx(2.0)
    assert sorted(look["text"] for look in summary["first"]) == ["clip 0", "clip 1"]


@pytest.fixture(scope="module")
def trained(tones, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    places = (f"grain_train_files={tones}", f"base_output_directory={folder}", "run_name=first")
    return folder / "first", in_a_process("train", "tiny", *SMALL, *places)


def test_training_prints_the_path_of_its_report_and_nothing_else(trained):
    folder, done = trained
    assert (done.status, done.out) == (0, f"{folder / 'report.html'}\n")
    assert "grpo 2/2" in done.err
    assert "Traceback" not in done.err
    assert "<html" in (folder / "report.html").read_text()
    steps = JsonLinesFile(RunFolder.open(folder).metrics_path).read().records
    assert [(line["phase"], line["step"]) for line in steps] == [("grpo", 1), ("grpo", 2)]


def test_a_report_is_written_again(command, trained):
    folder, _ = trained
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert command("report", folder).out == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_text() == before


def test_a_run_is_evaluated_by_its_own_configuration(command, trained, tones):
    folder, _ = trained
    done = command("evaluate", folder / "config.yml", f"grain_eval_files={tones}", "eval_max_clips=3", "--json")
    assert done.status == 0
    report = json.loads(done.out)
    assert (report["stage"], report["step"], report["clips"]) == ("grpo", 2, 3)
    assert (folder / "evaluations.jsonl").read_text() == done.out


def test_verbs_fail_with_a_traceback_where_the_fault_is_ours(monkeypatch, command):
    monkeypatch.setattr("audio_grpo.config.load_config", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["audio-grpo", "config", "tiny"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_the_installed_command_is_this_one():
    script = Path(sys.executable).parent / "audio-grpo"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "GRPO post-training of speech models" in done.stdout
