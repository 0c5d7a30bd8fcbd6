"""Two processes of four devices each do what one process of eight devices does."""

import shutil

import pytest
from grpo_steps import assert_alike, grpo_runs
from tiny_runs import with_tones

from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.run_folder import RunFolder

pytestmark = pytest.mark.slow

STEPS = 5
SHORT = {"steps": STEPS, "max_target_length": 76}
RUN = SHORT | {
    "checkpoint_period": 3,
    "eval_max_clips": 10,
    "log_completions": 3,
    "ici_data_parallelism": 2,
    "ici_fsdp_parallelism": 4,
    # Leaves some clips out, so that rows of both processes take up others.
    "audio_max_seconds": 2.6,
    "max_skipped_fraction": 0.5,
    # Several parts of a batch, and audio that the learner hears anew.
    "gradient_accumulation_steps": 2,
    "freeze_audio_encoder_params": False,
}
EXPERTS = SHORT | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_mlp_dim": 24,
    "grpo_beta": 0.0,
    "enable_checkpointing": False,
    "ici_fsdp_parallelism": 2,
    "ici_expert_parallelism": 2,
    # Rows of several batches meet in one, those of global arrays too.
    "dynamic_sampling_max_rounds": 1,
    "zero_std_skip_after": 1,
    "zero_std_skip_probability": 0.5,
}
TENSOR_WITHIN = {"ici_tensor_parallelism": 2}
TENSOR_ACROSS = {"dcn_data_parallelism": 1, "dcn_tensor_parallelism": 2}
TWO = {"devices": 4, "processes": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_tones(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def evaluated(folder):
    return RUN | {"grain_eval_files": str(folder / "data")}


@pytest.fixture(scope="module")
def in_two(folder, evaluated):
    """What both of two processes know of their run."""
    return [told.steps["two"] for told in grpo_runs(folder, {"two": evaluated}, **TWO)]


@pytest.fixture(scope="module")
def in_one(folder, evaluated, in_two):
    """Runs of one process."""
    interrupted(folder, "resumed in one")
    runs = {"one": evaluated, "resumed in one": RUN, "experts": EXPERTS | TENSOR_WITHIN}
    return grpo_runs(folder, runs, devices=8)[0].steps


@pytest.fixture(scope="module")
def in_two_anew(folder, in_two):
    """Runs of two other processes, as the first of them knows them."""
    interrupted(folder, "resumed in two")
    return grpo_runs(folder, {"resumed in two": RUN, "experts in two": EXPERTS | TENSOR_ACROSS}, **TWO)[0].steps


def interrupted(folder, name):
    """The run of two processes under another name, as if it had stopped after its checkpoint of step 3."""
    shutil.copytree(folder / "runs" / "two", folder / "runs" / name)
    shutil.rmtree(folder / "runs" / name / "checkpoints" / "grpo" / str(STEPS))


def lines(folder, run, name):
    return JsonLinesFile(getattr(RunFolder.open(folder / "runs" / run), f"{name}_path")).read().records


def test_two_processes_sample_and_learn_what_one_does(in_one, in_two):
    assert in_two[0] == in_two[1]
    assert len(in_one["one"]) == STEPS
    assert_alike(in_two[0], in_one["one"])


def test_the_first_process_writes_what_the_only_one_would(folder, in_one, in_two):
    assert [record["step"] for record in lines(folder, "two", "metrics")] == list(range(1, STEPS + 1))
    for name in ("completions", "evaluations"):
        assert lines(folder, "two", name) == lines(folder, "one", name) != []


def test_two_processes_go_on_bit_for_bit(in_two_anew, in_two):
    assert in_two_anew["resumed in two"] == in_two[0][3:]


def test_one_process_goes_on_from_what_two_kept(in_one, in_two):
    assert_alike(in_one["resumed in one"], in_two[0][3:])


def test_processes_that_hold_the_same_rows_share_the_model(in_two_anew, in_one):
    """Tensor parallelism across the processes: each reads every clip."""
    assert len(in_one["experts"]) == STEPS
    assert_alike(in_two_anew["experts in two"], in_one["experts"])
