import jax
import numpy as np
import pytest
from clips import RATE, clip, data_set
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.audio import audio_token_count, log_mel
from audio_grpo.config import Config
from audio_grpo.data import create_audio_data_iterator, encode_record, evaluation_batches
from audio_grpo.data.pipeline import Share, padded_frames, prompts_per_step, training_batches
from audio_grpo.data.records import load_samples
from audio_grpo.errors import UserError
from audio_grpo.text import load_tokenizer


def _config(folder, **changes) -> Config:
    fields = {"grain_train_files": str(folder), "tokenizer_path": "audio-grpo/tiny", "template": "transcript"}
    fields |= {"max_prefill_predict_length": 100, "max_target_length": 120, "audio_max_seconds": 2.5}
    return Config.model_validate(fields | changes)


@pytest.fixture
def folder(tmp_path):
    return data_set(tmp_path / "set", [clip(n, seconds=0.4 + n / 10) for n in range(20)])


@pytest.fixture
def bad_folder(tmp_path):
    """24 usable clips and 6 others, of every kind."""
    records = [clip(n, seconds=0.5 + n / 100) for n in range(30)]
    records[3] = clip(3, seconds=9)
    records[8] = clip(8, seconds=0.01)
    records[14] = clip(14, audio=b"fLaC, but no more")
    records[15] = clip(15, text="")
    records[22] = clip(22, audio=np.full(8000, np.nan, np.float32), sampling_rate=RATE)
    records[29] = clip(29, audio=b"\0\0", sampling_rate=RATE)
    return data_set(tmp_path / "set", records, shards=2)


def _equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        len(ours[name]) == len(theirs[name]) and all(map(np.array_equal, ours[name], theirs[name])) for name in ours
    )


def _ids(batches, number: int) -> list[str]:
    return [id_ for _ in range(number) for id_ in next(batches)["id"]]


def test_a_batch_has_the_promised_columns_shapes_and_types(folder):
    batch = next(training_batches(_config(folder, train_data_columns=["prompt", "other"]), 4))
    assert {name: (values.shape, values.dtype) for name, values in batch.items() if isinstance(values, np.ndarray)} == {
        "prompt": ((4, 100), np.int32),
        "prompt_true_length": ((4,), np.int32),
        "audios": ((4, 128, 300), np.float32),
        "audios_true_length": ((4,), np.int32),
        "audio_seconds": ((4,), np.float32),
    }
    lists = {name: values for name, values in batch.items() if isinstance(values, list)}
    assert lists.keys() == {"id", "language", "ground_truth_text", "samples"}
    assert all(len(values) == 4 for values in lists.values())


def test_every_row_is_its_clip_and_nothing_else(folder):
    tokenizer = load_tokenizer("audio-grpo/tiny")
    batch = next(training_batches(_config(folder), 8))
    for row, id_ in enumerate(batch["id"]):
        number = int(id_.removeprefix("clip-"))
        samples, _ = load_samples(clip(number, seconds=0.4 + number / 10))
        np.testing.assert_array_equal(batch["samples"][row], samples)
        features = log_mel(samples)
        frames, length = batch["audios_true_length"][row], batch["ar_true_length"][row]
        assert frames == features.shape[1]
        np.testing.assert_array_equal(batch["audios"][row, :, :frames], features)
        assert not batch["audios"][row, :, frames:].any()
        placeholders = batch["ar"][row] == tokenizer.token_id("<|audio_pad|>")
        assert placeholders.sum() == audio_token_count(int(frames))
        assert (batch["ar"][row, length:] == tokenizer.special_tokens("qwen3_omni", 1024).pad).all()
        assert batch["ground_truth_text"][row] == f"clip {number}"
        assert batch["audio_seconds"][row] == pytest.approx(0.4 + number / 10)


def test_an_epoch_has_every_record_once_and_epochs_and_seeds_differ_in_order(folder):
    batches = training_batches(_config(folder), 5)
    first, second = _ids(batches, 4), _ids(batches, 4)
    other_seed = _ids(training_batches(_config(folder, seed=1), 5), 4)
    assert sorted(first) == sorted(second) == sorted(other_seed) == sorted(f"clip-{n}" for n in range(20))
    assert len({tuple(first), tuple(second), tuple(other_seed)}) == 3
    assert _ids(training_batches(_config(folder), 5), 4) == first


def _of_processes(make, shares: list[list[int]]):
    """Each process's batches of its rows, put together as `gather` does."""
    processes = [make(Share(np.array(rows), lambda read: read())) for rows in shares]
    order = np.argsort(np.concatenate(shares))
    for own in zip(*processes, strict=True):
        yield {name: [[row for batch in own for row in batch[name]][i] for i in order] for name in own[0]}


@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1], [3, 5]]])
def test_processes_that_share_a_batch_read_what_one_process_reads(bad_folder, shares):
    """Over two epochs, unusable records included."""
    config = _config(bad_folder, max_skipped_fraction=1.0)
    whole = training_batches(config, 6)
    together = _of_processes(lambda share: training_batches(config, 6, share), shares)
    assert all(_equal(next(together), next(whole)) for _ in range(10))
    evaluated = _of_processes(lambda share: evaluation_batches(config, bad_folder, 6, share), shares)
    for ours, theirs in zip(evaluated, evaluation_batches(config, bad_folder, 6), strict=True):
        assert _equal(ours, theirs)


@pytest.mark.parametrize("stop_after", [0, 1, 4, 7])
def test_a_restored_iterator_goes_on_bit_for_bit(bad_folder, stop_after):
    config = _config(bad_folder, max_skipped_fraction=0.3)
    batches = training_batches(config, 5)
    for _ in range(stop_after):
        next(batches)
    state = batches.get_state()
    resumed = training_batches(config.model_copy(update={"grain_worker_count": stop_after % 2}), 5)
    resumed.set_state(state)
    assert resumed.skipped == batches.skipped
    for _ in range(6):
        assert _equal(next(batches), next(resumed))
    assert resumed.skipped == batches.skipped
    assert resumed.get_state() == batches.get_state()


def test_an_iterator_goes_back_to_a_state_of_its_own(folder):
    batches = training_batches(_config(folder), 5)
    state = batches.get_state()
    first = _ids(batches, 3)
    batches.set_state(state)
    assert _ids(batches, 3) == first


@pytest.mark.parametrize(("changes", "batch_size"), [({"seed": 1}, 5), ({}, 4)])
def test_a_state_of_other_data_seed_or_batch_is_refused(folder, changes, batch_size):
    state = training_batches(_config(folder), 5).get_state()
    with pytest.raises(UserError, match=r"(seed|batch_size) was \d and is \d"):
        training_batches(_config(folder, **changes), batch_size).set_state(state)


def test_an_unusable_record_makes_room_for_the_one_that_comes_there_in_the_next_epoch(bad_folder):
    unusable = {f"clip-{n}" for n in (3, 8, 14, 15, 22, 29)}
    batches = training_batches(_config(bad_folder, max_skipped_fraction=0.3), 6)
    first, second = _ids(batches, 5), _ids(batches, 5)
    usable = {f"clip-{n}" for n in range(30)} - unusable
    assert usable == set(first) == set(second)
    assert sum(ours == theirs for ours, theirs in zip(first, second, strict=True)) >= len(unusable)
    assert batches.skipped.seen == 30
    assert {name for names in batches.skipped.reasons.values() for name in names} == unusable
    assert batches.skipped.reasons["longer than audio_max_seconds 2.5"] == ["clip-3"]


@pytest.mark.parametrize("option", [{"inject_transcript": True}, {"sft_coef": 0.1}, {}])
def test_records_whose_transcript_does_not_fit_are_left_out_and_told_where_transcripts_are_learned(tmp_path, option):
    records = [clip(n, seconds=0.5, text="1" * (20 if n == 2 else 19)) for n in range(6)]
    folder = data_set(tmp_path / "set", records)
    config = _config(folder, max_skipped_fraction=0.2, **option)
    batches = training_batches(config, 3)
    read = set(_ids(batches, 2))
    assert ("clip-2" in read) is not bool(option)
    assert list(batches.skipped.reasons.values()) == ([["clip-2"]] if option else [])
    # Evaluation hears them all.
    assert set(_ids(evaluation_batches(config, folder, 3), 2)) == {f"clip-{n}" for n in range(6)}


def test_data_without_a_usable_record_is_refused(tmp_path):
    config = _config(data_set(tmp_path / "set", [clip(n, text="") for n in range(3)]), max_skipped_fraction=1.0)
    for batches in (training_batches(config, 2), evaluation_batches(config, tmp_path / "set", 2)):
        with pytest.raises(UserError, match=r"No record is usable .*: the record has no text \(such as clip-\d\)"):
            next(batches)


def test_too_many_unusable_records_stop_the_run_with_the_reasons(bad_folder):
    batches = training_batches(_config(bad_folder, max_skipped_fraction=0.19), 4)
    with pytest.raises(
        UserError, match=r"(?s)6 of the first \d+ records are unusable.*2 × shorter than [^:]*: (clip-8|clip-29)"
    ):
        for _ in range(8):
            next(batches)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_go_back_to_a_state(bad_folder):
    in_threads = training_batches(_config(bad_folder, max_skipped_fraction=0.3), 5)
    batches = training_batches(_config(bad_folder, max_skipped_fraction=0.3, grain_worker_count=2), 5)
    assert all(_equal(next(batches), next(in_threads)) for _ in range(2))
    state, skipped = batches.get_state(), batches.skipped
    following = [next(in_threads) for _ in range(5)]
    for _ in range(2):
        assert all(_equal(next(batches), expected) for expected in following)
        assert skipped == in_threads.skipped
        batches.set_state(state)
    batches.close()


def test_evaluation_goes_once_in_order_and_marks_what_only_fills_a_place(bad_folder):
    iterator = evaluation_batches(_config("unused", max_skipped_fraction=0.3), bad_folder, 8)
    batches = list(iterator)
    assert all(batch["audios"].shape == (8, 128, 300) for batch in batches)
    ids = [id_ for batch in batches for id_, valid in zip(batch["id"], batch["valid"], strict=True) if valid]
    order = [*range(0, 30, 2), *range(1, 30, 2)]  # two shards
    unusable = (3, 8, 14, 15, 22, 29)
    assert ids == [f"clip-{n}" for n in order if n not in unusable]
    assert [valid for batch in batches for valid in batch["valid"]] == [n not in unusable for n in order] + [False] * 2
    assert iterator.skipped.seen == 30


def test_evaluation_looks_at_no_more_clips_than_configured(folder):
    (batch,) = evaluation_batches(_config(folder, eval_max_clips=3), folder, 4)
    assert batch["id"] == ["clip-0", "clip-1", "clip-2", "clip-0"]
    assert batch["valid"].sum() == 3


def test_create_audio_data_iterator_batches_for_all_devices_or_those_of_a_mesh(folder):
    config = _config(folder, per_device_batch_size=0.5, gradient_accumulation_steps=3)
    assert len(next(create_audio_data_iterator(config))["id"]) == 6  # of 4 devices
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    assert len(next(create_audio_data_iterator(config, mesh))["id"]) == 3


@pytest.mark.parametrize(("per_device", "devices"), [(0.5, 1), (0.75, 2)])
def test_a_batch_that_is_no_whole_number_of_prompts_is_refused(per_device, devices):
    with pytest.raises(UserError, match=f"× {devices} devices .* is [0-9.]+ prompts"):
        prompts_per_step(_config("unused", per_device_batch_size=per_device), devices)


def test_missing_data_is_named(tmp_path):
    with pytest.raises(UserError, match="grain_train_files is not set"):
        create_audio_data_iterator(_config("x", grain_train_files=None))
    with pytest.raises(UserError, match="nowhere"):
        create_audio_data_iterator(_config(tmp_path / "nowhere"))


@given(max_seconds=st.floats(0.1, 1500), max_tokens=st.integers(1, 20_000), share=st.floats(0, 1))
def test_a_batch_has_room_for_every_clip_within_the_limits(max_seconds, max_tokens, share):
    frames = max(50, -(-int(share * max_seconds * RATE) // 160))
    if audio_token_count(frames) <= max_tokens:
        assert frames <= padded_frames(max_seconds, max_tokens)


@pytest.mark.parametrize(
    ("max_seconds", "max_tokens", "frames"),
    [(30.0, 10_000, 3000), (30.01, 10_000, 3100), (0.1, 10_000, 100), (30.0, 130, 1000), (30.0, 131, 1100)],
)
def test_a_batch_has_room_for_no_more_than_the_smaller_limit(max_seconds, max_tokens, frames):
    assert padded_frames(max_seconds, max_tokens) == frames


def test_a_record_is_read_as_any_writer_encoded_it(tmp_path):
    samples = np.sin(np.arange(16_000) / 20).astype(np.float32)
    folder = data_set(tmp_path / "set", [clip(0, audio=samples, sampling_rate=RATE)])
    assert len(encode_record(clip(0, audio=samples, sampling_rate=RATE))) > 64_000
    batch = next(training_batches(_config(folder), 1))
    np.testing.assert_array_equal(batch["audios"][0, :, :100], log_mel(samples))
