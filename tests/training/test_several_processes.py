"""Two processes of four devices each do what one process of eight devices does."""

import shutil

import pytest
from grpo_steps import grpo_steps
from tiny_runs import with_tones

from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.run_folder import RunFolder

STEPS = 5
RUN = {
    "steps": STEPS,
    "checkpoint_period": 3,
    "ici_data_parallelism": 2,
    "ici_fsdp_parallelism": 4,
    "eval_max_clips": 10,
    "log_completions": 3,
    # Leaves some clips out, so that rows of both processes take up others.
    "audio_max_seconds": 2.6,
    "max_skipped_fraction": 0.5,
    # Several parts of a batch, and audio that the learner hears anew.
    "gradient_accumulation_steps": 2,
    "freeze_audio_encoder_params": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_tones(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def steps(folder):
    def run(name, **changes):
        return grpo_steps(folder, run_name=name, **{**RUN, **changes})

    return run


@pytest.fixture(scope="module")
def in_one(steps, folder):
    return steps("one", devices=8, grain_eval_files=str(folder / "data"))[0]


@pytest.fixture(scope="module")
def in_two(steps, folder):
    return steps("two", devices=4, processes=2, grain_eval_files=str(folder / "data"))


def lines(folder, run, name):
    return JsonLinesFile(getattr(RunFolder.open(folder / "runs" / run), f"{name}_path")).read().records


def assert_alike(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one.clips, one.tokens) == (other.clips, other.tokens)
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4, abs=1e-4)


def test_two_processes_sample_and_learn_what_one_does(in_one, in_two):
    assert in_two[0] == in_two[1]
    assert len(in_one) == STEPS
    assert_alike(in_two[0], in_one)


def test_the_first_process_writes_what_the_only_one_would(folder, in_one, in_two):
    assert [record["step"] for record in lines(folder, "two", "metrics")] == list(range(1, STEPS + 1))
    for name in ("completions", "evaluations"):
        assert lines(folder, "two", name) == lines(folder, "one", name) != []


@pytest.fixture
def interrupted(folder, in_two, request):
    """The run of two processes, as if it had stopped after its checkpoint of step 3."""
    runs, name = folder / "runs", request.node.name
    shutil.copytree(runs / "two", runs / name)
    shutil.rmtree(runs / name / "checkpoints" / "grpo" / str(STEPS))
    return name


def test_two_processes_go_on_bit_for_bit(steps, interrupted, in_two):
    assert steps(interrupted, devices=4, processes=2)[0] == in_two[0][3:]


def test_one_process_goes_on_from_what_two_kept(steps, interrupted, in_two):
    assert_alike(steps(interrupted, devices=8)[0], in_two[0][3:])


def test_processes_that_hold_the_same_rows_share_the_model(steps, in_one):
    """Tensor parallelism across the processes: each reads every clip."""
    sizes = {"ici_data_parallelism": 1, "dcn_data_parallelism": 1, "dcn_tensor_parallelism": 2}
    assert_alike(steps("tensor", devices=4, processes=2, enable_checkpointing=False, **sizes)[0], in_one)
