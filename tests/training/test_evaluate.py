import io

import jax.numpy as jnp
import jiwer
import numpy as np
import pytest
import soundfile
from tiny_runs import tiny_config

from audio_grpo.data.write import write_records
from audio_grpo.errors import UserError
from audio_grpo.grpo import Rollout
from audio_grpo.text import get_normalizer, load_tokenizer
from audio_grpo.training import Evaluator, evaluate, evaluate_run
from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import create_session
from audio_grpo.training.weights import starting_weights
from audio_grpo.types import AudioRecord

WORDS = ("zero", "one", "two", "three", "Four", "five,", "six")
SECONDS = {0.5: "0-2 s", 1.99: "0-2 s", 2.0: "2-5 s", 4.9: "2-5 s", 6.0: "5-10 s", 12.0: "10-20 s"}
LANGUAGES = ("English", "German", None, "German")
COUNT = 22
"""Not a multiple of the eight clips of a batch."""


def corpus():
    """By clip id: language, seconds, reference, and a hypothesis with words left out, replaced and put in."""
    rng = np.random.default_rng(0)
    clips = {}
    for number in range(COUNT):
        reference = rng.choice(WORDS, rng.integers(1, 6)).tolist()
        heard = [rng.choice(WORDS) if rng.random() < 0.2 else word for word in reference if rng.random() > 0.2]
        inserted = rng.choice(WORDS, rng.integers(0, 2)).tolist()
        seconds = list(SECONDS)[number % len(SECONDS)]
        language = LANGUAGES[number % len(LANGUAGES)]
        clips[f"clip-{number:02}"] = (language, seconds, " ".join(reference), " ".join([*inserted, *heard]))
    return clips


CLIPS = corpus()


def noise(seconds):
    file = io.BytesIO()
    samples = 0.1 * np.random.default_rng(0).normal(size=round(16_000 * seconds))
    soundfile.write(file, samples, 16_000, format="FLAC")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    records = [
        AudioRecord(audio=noise(seconds), text=reference, language=language, id=name)
        for name, (language, seconds, reference, _) in CLIPS.items()
    ]
    write_records(records, folder / "data")
    return folder


def config_of(folder, **changes):
    settings = {
        "grain_eval_files": str(folder / "data"),
        "audio_max_seconds": 12.0,
        "max_prefill_predict_length": 200,
        "max_target_length": 240,
        "max_slots": 6,
    }
    return tiny_config(folder, **(settings | changes))


@pytest.fixture
def asked(monkeypatch):
    """Answers with the corpus' hypotheses in place of a model; gives the ids of each batch that was asked about."""
    batches, tokenizer = [], load_tokenizer("audio-grpo/tiny")

    def answer(engine, prompts, audio, ids, *, seed):
        assert engine.settings.sampling.greedy
        batches.append(list(ids))
        tokens = np.zeros((len(ids), 1, engine.settings.completion_length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for b, name in enumerate(ids):
            target = [*tokenizer.encode(CLIPS[name][3]), engine.special.stop[0]]
            tokens[b, 0, : len(target)], mask[b, 0, : len(target)] = target, True
        nothing = np.zeros(tokens.shape, np.float32)
        return Rollout(tokens, mask, nothing, nothing, [["stop"]] * len(ids), jnp.zeros((len(ids), 0, 32)))

    monkeypatch.setattr(evaluate, "generate_offline_completions", answer)
    return batches


def report_of(folder, **changes):
    session = create_session(config_of(folder, **changes))
    return Evaluator(session).run({}, stage="grpo", step=7)


def assert_rates_are_jiwers(rates, clips):
    rule = get_normalizer("basic")
    references, hypotheses = ([rule(clip[place]) for clip in clips] for place in (2, 3))
    words = jiwer.process_words(references, hypotheses)
    characters = jiwer.process_characters(references, hypotheses)
    assert rates.wer == pytest.approx(words.wer)
    assert rates.cer == pytest.approx(characters.cer)
    assert (rates.substitutions, rates.deletions, rates.insertions) == (
        words.substitutions, words.deletions, words.insertions,
    )  # fmt: skip
    assert rates.clips == len(clips)


def test_corpus_rates_are_those_of_jiwer(asked, folder):
    report = report_of(folder)
    assert_rates_are_jiwers(report.rates, list(CLIPS.values()))
    assert min(report.rates.substitutions, report.rates.deletions, report.rates.insertions) > 0
    assert (report.stage, report.step, report.text_normalizer) == ("grpo", 7, "basic")


def test_rates_are_told_for_each_language(asked, folder):
    report = report_of(folder)
    assert list(report.by_language) == ["English", "German", "unknown"]
    for name, rates in report.by_language.items():
        assert_rates_are_jiwers(rates, [clip for clip in CLIPS.values() if (clip[0] or "unknown") == name])


def test_rates_are_told_for_each_bucket_of_durations_that_has_clips(asked, folder):
    report = report_of(folder)
    assert list(report.by_duration) == ["0-2 s", "2-5 s", "5-10 s", "10-20 s"]
    for name, rates in report.by_duration.items():
        assert_rates_are_jiwers(rates, [clip for clip in CLIPS.values() if SECONDS[clip[1]] == name])


def test_what_fills_up_the_last_batch_does_not_count(asked, folder):
    report = report_of(folder)
    assert [len(ids) for ids in asked] == [8, 8, 8]
    assert asked[-1][-3:] == ["clip-21", "clip-00", "clip-00"]
    assert report.rates.clips == COUNT
    assert sorted({name for ids in asked for name in ids}) == sorted(CLIPS)


def test_only_the_first_clips_are_looked_at_where_a_number_is_given(asked, folder):
    assert_rates_are_jiwers(report_of(folder, eval_max_clips=5).rates, list(CLIPS.values())[:5])


def test_the_best_and_the_worst_utterances_are_shown(asked, folder):
    utterances = report_of(folder).utterances
    rates = {name: jiwer.wer(*map(get_normalizer("basic"), clip[2:])) for name, clip in CLIPS.items()}
    assert [u.wer for u in utterances] == pytest.approx([*sorted(rates.values())[:10], *sorted(rates.values())[-10:]])
    for utterance in utterances:
        assert utterance.wer == pytest.approx(rates[utterance.id])
        assert (utterance.reference, utterance.hypothesis) == CLIPS[utterance.id][2:]


def test_a_text_without_an_answer_counts_as_an_empty_one(asked, folder):
    rates = report_of(folder, template="reasoning", max_prefill_predict_length=300, max_target_length=340).rates
    assert rates.deletions == rates.reference_words == sum(len(clip[2].split()) for clip in CLIPS.values())


def test_an_evaluation_without_data_is_refused(folder):
    with pytest.raises(UserError, match="grain_eval_files is not set: name the ArrayRecord data"):
        Evaluator(create_session(config_of(folder, grain_eval_files=None)))


def test_an_evaluation_is_noted_in_the_folder_of_its_run(asked, folder):
    config = config_of(folder, run_name="noted")
    report = evaluate_run(config)
    assert (report.stage, report.step) == ("start", 0)
    path = RunFolder.create(config.base_output_directory, "noted")
    assert not path.evaluations_path.exists()
    path.config_path.write_text("a run that began")
    assert evaluate_run(config) == report
    assert JsonLinesFile(path.evaluations_path).read().records == [report.to_record()]


def test_the_model_itself_answers_all_clips(folder):
    """Untrained, it is wrong about nearly everything, and alike each time."""
    session = create_session(config_of(folder, eval_max_clips=3, max_target_length=204))
    evaluator, weights = Evaluator(session), starting_weights(session, "sft")
    first, second = (evaluator.run(weights, stage="start", step=0) for _ in range(2))
    assert first == second
    assert first.rates.clips == 3
    assert first.rates.wer > 0.5
