import numpy as np
import pytest
from clips import clip, flac

from audio_grpo.audio import audio_token_count, log_mel
from audio_grpo.data.records import encode_record, load_samples
from audio_grpo.data.source import StoredRecord, Unusable
from audio_grpo.data.stages import (
    AudioToMelSpectrogram,
    Batch,
    BuildAudioGRPOPrompt,
    CollectGroundTruth,
    PadAudioGRPOToMaxLength,
    ParseAudioFeatures,
    RequireTranscriptFits,
    ResampleAudio,
)
from audio_grpo.text import ReasoningTags, load_tokenizer

TOKENIZER = load_tokenizer("audio-grpo/tiny")
TAGS = ReasoningTags(reasoning_start="<r>", reasoning_end="</r>", solution_start="<a>", solution_end="</a>")


def _stored(record):
    return StoredRecord("record 7", encode_record(record))


def _prompt(**changes):
    fields = {"tokenizer": TOKENIZER, "template": "transcript", "instruction": None, "tags": TAGS}
    fields |= {"default_language": None, "prompt_column": "ar", "max_length": 200}
    return BuildAudioGRPOPrompt(**fields | changes)


def _prompt_text(element):
    return TOKENIZER.decode(element["ar"].tolist(), skip_special_tokens=False)


def test_parsing_gives_samples_and_what_the_record_says():
    element = ParseAudioFeatures(0.1, 30.0)(_stored(clip(1, seconds=1.5)))
    assert (element["id"], element["text"], element["language"]) == ("clip-1", "clip 1", "English")
    assert (element["sampling_rate"], element["audio_seconds"]) == (16_000, 1.5)
    np.testing.assert_array_equal(element["samples"], load_samples(clip(1, seconds=1.5))[0])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (clip(1, seconds=0.05), "shorter than audio_min_seconds 0.1"),
        (clip(1, seconds=2.1), "longer than audio_max_seconds 2.0"),
        (clip(1, text=" \n"), "the record has no text"),
        (clip(1, audio=flac()[:100]), "corrupt"),
        (clip(1, sampling_rate=8000), "contradicts"),
    ],
)
def test_an_unusable_record_keeps_its_id_and_gets_a_reason(record, reason):
    unusable = ParseAudioFeatures(0.1, 2.0)(_stored(record))
    assert unusable.name == "clip-1"
    assert reason in unusable.reason


def test_a_record_without_an_id_is_named_by_its_place():
    assert ParseAudioFeatures(0.1, 2.0)(_stored(clip(1, id=None)))["id"] == "record 7"
    assert ParseAudioFeatures(0.1, 2.0)(StoredRecord("record 7", b"junk")).name == "record 7"


def test_clips_on_the_limits_are_used():
    for seconds in (0.1, 2.0):
        assert ParseAudioFeatures(0.1, 2.0)(_stored(clip(1, seconds=seconds)))["id"] == "clip-1"


def test_every_stage_passes_an_unusable_record_on():
    unusable = Unusable("x", "y")
    pad = PadAudioGRPOToMaxLength(prompt_column="ar", max_length=9, max_frames=100, pad_token=0)
    for stage in (ParseAudioFeatures(0.1, 9.0), ResampleAudio(), AudioToMelSpectrogram(128), _prompt(), pad):
        assert stage(unusable) is unusable


def test_audio_of_any_rate_becomes_the_features_of_16_khz():
    samples = np.sin(np.arange(48_000) / 50).astype(np.float32)
    element = ResampleAudio()({"samples": samples, "sampling_rate": 48_000})
    assert element.keys() == {"samples"}
    assert len(element["samples"]) == 16_000
    element = AudioToMelSpectrogram(40)(element)
    assert element.keys() == {"samples", "audios"}
    assert element["audios"].shape == (40, 100)


@pytest.mark.parametrize("frames", [50, 99, 100, 101, 307])
def test_a_prompt_has_a_placeholder_for_each_audio_token(frames):
    element = _prompt()({"id": "x", "language": "Arabic", "audios": np.zeros((128, frames), np.float32)})
    placeholder = TOKENIZER.token_id("<|audio_pad|>")
    assert (element["ar"] == placeholder).sum() == audio_token_count(frames)
    assert element["ar"].dtype == np.int32
    assert "Transcribe the Arabic audio" in _prompt_text(element)


def test_a_record_without_language_gets_the_configured_one():
    element = {"id": "x", "language": None, "audios": np.zeros((128, 50), np.float32)}
    prompted = _prompt(default_language="Dutch")(element)
    assert prompted["language"] == "Dutch"
    assert "Dutch" in _prompt_text(prompted)


def test_a_prompt_is_refused_when_one_token_too_long_and_never_cut():
    element = {"id": "x", "language": None, "audios": np.zeros((128, 100), np.float32)}
    length = len(_prompt()(element)["ar"])
    assert len(_prompt(max_length=length)(element)["ar"]) == length
    refused = _prompt(max_length=length - 1)(element)
    assert refused == Unusable("x", f"its prompt is longer than max_prefill_predict_length {length - 1}")


@pytest.mark.parametrize(("template", "beside"), [("transcript", ""), ("qwen3-asr", "language None<asr_text>")])
def test_a_transcript_is_refused_when_one_token_too_long_with_its_stop_token(template, beside):
    tokens = len(TOKENIZER.encode(beside)) + 5 + 1
    element = {"id": "x", "language": None, "text": "11111"}  # each digit is a token
    settings = {"tokenizer": TOKENIZER, "template": template, "tags": TAGS, "stop": 1}
    assert RequireTranscriptFits(max_length=tokens, **settings)(element) is element
    refused = RequireTranscriptFits(max_length=tokens - 1, **settings)(element)
    reason = f"its transcript exceeds the {tokens - 1} tokens that max_target_length leaves a completion"
    assert refused == Unusable("x", reason)


def test_a_record_that_lacks_what_the_instruction_needs_is_unusable():
    element = {"id": "x", "language": None, "audios": np.zeros((128, 100), np.float32)}
    assert "needs a language" in _prompt(instruction="Write {language}.")(element).reason


def test_padding_keeps_what_is_there_and_tells_how_much_it_is():
    features = log_mel(np.ones(16_000, np.float32))
    element = {"ar": np.array([5, 6], np.int32), "audios": features}
    pad = PadAudioGRPOToMaxLength(prompt_column="ar", max_length=4, max_frames=300, pad_token=9)
    padded = pad(element)
    assert padded["ar"].tolist() == [5, 6, 9, 9]
    assert (padded["ar_true_length"], padded["audios_true_length"]) == (2, 100)
    np.testing.assert_array_equal(padded["audios"][:, :100], features)
    assert padded["audios"].shape == (128, 300)
    assert not padded["audios"][:, 100:].any()


def test_a_batch_stacks_arrays_and_lists_the_rest():
    batch = Batch()([{"a": np.array([n]), "b": np.float32(n), "text": str(n)} for n in range(3)])
    assert batch["a"].tolist() == [[0], [1], [2]]
    assert batch["b"].dtype == np.float32
    assert CollectGroundTruth()(batch)["ground_truth_text"] == ["0", "1", "2"]
