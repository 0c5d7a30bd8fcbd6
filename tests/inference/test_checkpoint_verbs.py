"""transcribe, generate, score and export on tiny random checkpoints."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from audio_grpo import inference
from audio_grpo.audio import audio_token_count
from audio_grpo.errors import UserError
from audio_grpo.model.checkpoint import create_published
from audio_grpo.model.spec import thinker_spec
from audio_grpo.text import load_tokenizer
from small_model import random_weights, small_config

SECONDS = (0.3, 0.5, 1.0, 2.6)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("audio-grpo/tiny")


@pytest.fixture(scope="module", params=["qwen3_omni", "qwen3_asr"])
def checkpoint(request, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / request.param
    config = small_config(vocab_size=1024, decoder_block=request.param, logits_via_embedding=True)
    special = tokenizer.special_tokens(request.param, 1024)
    create_published(random_weights(config), thinker_spec(config), folder, family=request.param, special=special)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    rows = []
    for i, seconds in enumerate(SECONDS):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.normal(size=int(16_000 * seconds)), 16_000)
        rows.append({"audio": f"{i}.wav", "completion_token_ids": rng.integers(6, 900, 3 + i).tolist()})
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_scores_of_generated_tokens_are_their_log_probabilities(checkpoint, manifest, tmp_path):
    model = inference.open_checkpoint(str(checkpoint))
    results = inference.generate(model, str(manifest), num_generations=2, temperature=0.8, max_new_tokens=9, seed=3)
    assert len(results) == len(SECONDS)
    rows = [
        {"audio": str(manifest.parent / f"{i}.wav"), "completion_token_ids": completion["token_ids"]}
        for i, result in enumerate(results)
        for completion in result["completions"]
    ]
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(map(json.dumps, rows)))
    scores = inference.score(model, str(again), temperature=0.8)
    completions = [completion for result in results for completion in result["completions"]]
    for scored, completion in zip(scores, completions, strict=True):
        np.testing.assert_allclose(scored["logprobs"], completion["logprobs"], atol=1e-4)
        assert scored["logprob"] == pytest.approx(sum(scored["logprobs"]))


def test_a_row_scores_the_same_alone_and_among_others(checkpoint, manifest, tmp_path):
    model = inference.open_checkpoint(str(checkpoint))
    together = inference.score(model, str(manifest))
    for i, line in enumerate(manifest.read_text().splitlines()):
        row = json.loads(line) | {"audio": str(manifest.parent / f"{i}.wav")}
        alone = tmp_path / f"{i}.jsonl"
        alone.write_text(json.dumps(row))
        np.testing.assert_allclose(
            inference.score(model, str(alone))[0]["logprobs"], together[i]["logprobs"], atol=1e-5
        )


def test_prompts_of_token_ids_take_the_place_of_the_default(checkpoint, manifest, tmp_path):
    model = inference.open_checkpoint(str(checkpoint))
    pads = [model.special.audio_pad] * int(audio_token_count(100))
    row = {"audio": str(manifest.parent / "2.wav"), "completion_token_ids": [9, 10]}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [row, row | {"prompt_token_ids": [7, *pads, 8]}])))
    first, second = inference.score(model, str(path))
    assert first["logprob"] != second["logprob"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": "nowhere.wav"}, "nowhere.wav does not exist"),
        ({"audio": None}, "has no audio"),
        ({"completion_token_ids": [5000]}, "0 to 1023"),
        ({"completion_token_ids": []}, "at least one"),
        ({"completion_token_ids": None}, "give text or completion_token_ids"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids must be a list"),
    ],
)
def test_rows_at_fault_are_refused_by_name(checkpoint, manifest, change, message):
    model = inference.open_checkpoint(str(checkpoint))
    row = {"audio": "2.wav", "completion_token_ids": [9]} | change
    path = manifest.parent / "fault.jsonl"
    path.write_text(json.dumps({key: value for key, value in row.items() if value is not None}))
    with pytest.raises(UserError, match=message):
        inference.score(model, str(path))


def test_transcripts_come_in_the_files_order_with_log_probabilities(checkpoint, manifest):
    model = inference.open_checkpoint(str(checkpoint))
    files = [str(manifest.parent / f"{i}.wav") for i in (2, 0)]
    transcripts = list(inference.transcribe(model, files, language="English"))
    assert [transcript.audio for transcript in transcripts] == files
    assert [transcript.audio_seconds for transcript in transcripts] == [1.0, 0.5]
    for transcript in transcripts:
        assert len(transcript.token_ids) == len(transcript.logprobs)
        assert transcript.language == "English"


def test_a_file_that_is_no_audio_is_named(checkpoint, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"not audio")
    with pytest.raises(UserError, match=r"noise\.wav"):
        list(inference.transcribe(inference.open_checkpoint(str(checkpoint)), [str(tmp_path / "noise.wav")]))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a published checkpoint"):
        inference.open_checkpoint(str(tmp_path))


def test_rows_of_token_ids_need_no_tokenizer(checkpoint, manifest, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "tokenizer.json":
            (bare / file.name).symlink_to(file)
    model = inference.open_checkpoint(str(bare))
    assert model.tokenizer is None
    pads = [model.special.audio_pad] * int(audio_token_count(100))
    row = {"audio": str(manifest.parent / "2.wav"), "prompt_token_ids": [7, *pads, 8]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (result,) = inference.generate(model, str(path), max_new_tokens=4)
    assert len(result["completions"][0]["token_ids"]) == 4
    assert result["completions"][0]["text"] is None
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        list(inference.transcribe(model, [row["audio"]]))


def test_weights_come_back_as_they_were_written(checkpoint):
    model = inference.open_checkpoint(str(checkpoint))
    config = small_config(vocab_size=1024, logits_via_embedding=True)
    for key, value in random_weights(config).items():
        np.testing.assert_array_equal(model.weights[key], jnp.asarray(value), err_msg=key)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [5000]}'])
def test_a_damaged_generation_config_is_refused_by_name(checkpoint, tmp_path, text):
    for file in checkpoint.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        inference.open_checkpoint(str(tmp_path))
