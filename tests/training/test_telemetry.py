import math
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tensorboardX.proto.event_pb2 import Event, SessionLog

from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.telemetry import CompletionsWriter, MetricsWriter, SampledCompletion


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(str(tmp_path), "run")


def write_steps(run: RunFolder, steps: range, **options: object) -> None:
    with MetricsWriter(run, "grpo", tensorboard=False, **options) as writer:
        for step in steps:
            writer.write(step, {"reward": step / 10})


def events(folder: Path) -> list[Event]:
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record is its length (8), that length's checksum (4), the data, its checksum (4)
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def completion(step: int, **changes: object) -> SampledCompletion:
    plain = {
        "step": step,
        "clip_id": "speaker3/كلمة 17",
        "language": "Arabic",
        "reference": "ذهب الولد",
        "completion": "<answer>ذهب</answer>",
        "hypothesis": "ذهب",
        "wer": 0.5,
        "rewards": {"asr_wer_reward": 0.5},
        "reward": 0.5,
        "advantage": math.nan,
        "length": 5,
        "finish_reason": "stop",
    }
    return SampledCompletion(**(plain | changes))


def test_each_step_is_in_the_file_as_soon_as_it_is_written(run):
    writer = MetricsWriter(run, "grpo", tensorboard=False)
    for step in (1, 2):
        writer.write(step, {"reward": 0.5, "kl": math.nan})
        last = JsonLinesFile(run.metrics_path).read().records[-1]
        assert (last["step"], last["phase"], last["reward"]) == (step, "grpo", 0.5)
        assert math.isnan(last["kl"])


def test_numbers_of_numpy_are_taken(run):
    with MetricsWriter(run, "grpo", tensorboard=False) as writer:
        writer.write(1, {"reward": np.float32(0.5), "num_tokens": np.int32(7)})
    assert run.metrics_path.read_text() == '{"step": 1, "phase": "grpo", "reward": 0.5, "num_tokens": 7.0}\n'


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(run, tmp_path):
    write_steps(run, range(1, 9))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 9, "ph')
    write_steps(run, range(6, 12), resume_step=5)

    whole = RunFolder.create(str(tmp_path), "whole")
    write_steps(whole, range(1, 12))
    assert run.metrics_path.read_text() == whole.metrics_path.read_text()


def test_resuming_one_phase_leaves_the_other_alone(run):
    with MetricsWriter(run, "sft", tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    write_steps(run, range(1, 4))
    write_steps(run, range(2, 3), resume_step=1)
    lines = [(each["phase"], each["step"]) for each in JsonLinesFile(run.metrics_path).read().records]
    assert lines == [("sft", 1), ("sft", 2), ("sft", 3), ("grpo", 1), ("grpo", 2)]


@pytest.mark.parametrize("step", [5, 4])
def test_a_step_that_does_not_follow_is_refused(run, step):
    writer = MetricsWriter(run, "grpo", resume_step=4, tensorboard=False)
    if step == 5:
        writer.write(5, {})
    with pytest.raises(ValueError, match=f"step {step} was written after step {step}"):
        writer.write(step, {})


def test_a_metric_named_like_a_key_of_the_line_is_refused(run):
    with pytest.raises(ValueError, match="metrics can not be named"):
        MetricsWriter(run, "grpo", tensorboard=False).write(1, {"phase": 1.0})


def test_tensorboard_gets_the_same_numbers_by_phase(run):
    with MetricsWriter(run, "grpo") as writer:
        writer.write(1, {"reward": 0.5, "rewards/asr_wer_reward/mean": -0.25})
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(Path(run.tensorboard / "grpo"))
        for value in event.summary.value
    ]
    assert scalars == [(1, "reward", 0.5), (1, "rewards/asr_wer_reward/mean", -0.25)]


def test_tensorboard_is_told_which_steps_a_resumed_run_repeats(run):
    with MetricsWriter(run, "grpo", resume_step=4) as writer:
        writer.write(5, {"reward": 0.5})
    starts = [
        each.step for each in events(Path(run.tensorboard / "grpo")) if each.session_log.status == SessionLog.START
    ]
    assert starts == [5]


def test_without_tensorboard_there_are_no_events(run):
    write_steps(run, range(1, 2))
    assert not run.tensorboard.exists()


def test_a_completion_comes_back_from_its_line(run):
    written = completion(1, advantage=0.25)
    CompletionsWriter(run).write(written)
    assert [SampledCompletion.from_record(each) for each in JsonLinesFile(run.completions_path).read().records] == [
        written
    ]


def test_completions_of_repeated_steps_are_dropped(run):
    first = CompletionsWriter(run)
    for step in (1, 1, 2, 3):
        first.write(completion(step))
    CompletionsWriter(run, resume_step=1).write(completion(2))
    assert [each["step"] for each in JsonLinesFile(run.completions_path).read().records] == [1, 1, 2]


def test_a_clip_is_kept_once_and_sounds_the_same(run):
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, 800).astype(np.float32)
    writer = CompletionsWriter(run)
    for step in (1, 2):
        writer.write(completion(step), samples)
    names = {each["audio"] for each in JsonLinesFile(run.completions_path).read().records}
    (path,) = run.clips.iterdir()
    assert names == {path.name}
    kept, rate = soundfile.read(str(path))
    assert (rate, kept.shape) == (16_000, samples.shape)
    np.testing.assert_allclose(kept, samples, atol=2**-15)


def test_clips_that_share_a_name_do_not_share_a_file(run):
    writer = CompletionsWriter(run)
    for value in (0.1, 0.2):
        writer.write(completion(1), np.full(160, value, np.float32))
    assert len(list(run.clips.iterdir())) == 2
