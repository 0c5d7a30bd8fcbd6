import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from fake_run import TRANSCRIPTS, begin_fake_run, evaluations, write_fake_run, write_metrics

from audio_grpo.errors import UserError
from audio_grpo.report import build_report
from audio_grpo.report.completions import select
from audio_grpo.report.curves import series_of
from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.telemetry import CompletionsWriter, MetricsWriter, SampledCompletion

VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """Text and attributes of a page, whose tags must close in order."""

    def __init__(self, run: RunFolder):
        super().__init__()
        self.source = build_report(run.path).read_text()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Page:
    return Page(write_fake_run(tmp_path_factory.mktemp("runs")))


def completion(**changes: object) -> SampledCompletion:
    plain = {
        "step": 1,
        "clip_id": "clip",
        "language": None,
        "reference": "a",
        "completion": "a",
        "hypothesis": "a",
        "wer": 0.0,
        "rewards": {"r": 1.0},
        "reward": 1.0,
        "advantage": 0.0,
        "length": 2,
        "finish_reason": "stop",
    }
    return SampledCompletion(**(plain | changes))


def test_a_finished_run_shows_each_stage_and_what_changed(finished):
    final = evaluations(60)
    for report in (final[0], final[1], final[3]):
        assert f"{report.rates.wer:.1%}".replace("%", "\N{NO-BREAK SPACE}%") in finished.text
    assert "From “sft” to “grpo”, corpus WER fell from 42.0" in finished.text
    assert "Not in this report" not in finished.text


def test_every_metric_is_in_the_report(finished):
    for name in ("kl", "reward", "± 0.3", "completions/mean_length", "sampling/sampling_logp_difference/max", "loss"):
        assert name in finished.text
    assert "3 not finite" in finished.text


def test_metrics_stand_together_by_topic(finished):
    topics = ["Reward", "Transcription errors", "Policy", "Gradient norms by part", "Skipped updates by cause"]
    curves = finished.text.split("GRPO")[-1]
    places = [curves.index(topic) for topic in topics]
    assert places == sorted(places)
    assert "Other" not in curves
    for name in ("substitution_rate", "deletion_rate", "insertion_rate"):
        assert places[1] < curves.index(f"errors/{name}") < places[2]
    assert places[1] < curves.index("answers/wrong_script_rate") < places[2]
    assert places[3] < curves.index("grad_norm/attention") < places[4] < curves.index("skipped_updates/rewards")


def test_every_completion_can_be_heard(finished):
    sources = [value for tag, name, value in finished.attributes if (tag, name) == ("audio", "src")]
    assert len(sources) == 8 * len(TRANSCRIPTS)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sources[0].removeprefix("data:audio/flac;base64,"))))
    assert rate == 16_000
    np.testing.assert_allclose(samples, 0.2 * np.sin(2 * np.pi * 220 * np.arange(24_000) / 16_000), atol=1e-4)


def test_nothing_outside_the_file_is_referred_to(finished):
    links = [value for _, name, value in finished.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert all(value.startswith(("#", "data:")) for value in links)
    assert not re.search(r"https?://|url\(|@import", finished.source)


def test_languages_durations_configuration_and_versions_are_shown(finished):
    for text in ("Arabic", "2-5 s", "num_generations: 8", "1 × CPU", "jax ", "Best utterances", "2 min"):
        assert text in finished.text


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</pre></style>"])
def test_a_transcript_is_data_wherever_it_is_shown(tmp_path, hostile):
    run = begin_fake_run(tmp_path)
    run.config_path.write_text(f"text_normalizer: none\nrun_name: |\n  {hostile}\n")
    CompletionsWriter(run).write(
        completion(
            clip_id=hostile, language=hostile, reference=hostile, completion=hostile, hypothesis=hostile + " b",
            rewards={hostile: 1.0},
        )
    )  # fmt: skip
    with MetricsWriter(run, "grpo", tensorboard=False) as metrics:
        metrics.write(1, {hostile: 1.0})
    page = Page(run)
    assert page.text.count(hostile) >= 5
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert [tag for tag, _, _ in page.attributes].count("img") == 0
    assert page.source.count("<script>") == 1


def test_a_run_that_has_only_begun_says_what_is_missing(tmp_path):
    page = Page(begin_fake_run(tmp_path))
    for text in ("No metrics yet.", "No completions yet.", "No evaluation yet.", "No environment.json"):
        assert text in page.text


def test_a_stopped_run_says_how_far_it_came(tmp_path):
    run = begin_fake_run(tmp_path)
    write_metrics(run, 12)
    assert "GRPO has 12 of 60 steps" in Page(run).text


def test_a_line_that_is_being_written_is_left_out_and_told(tmp_path):
    run = begin_fake_run(tmp_path)
    run.metrics_path.write_text('{"step": 1, "phase": "grpo", "reward": 0.5}\n{"step": 2, "pha')
    page = Page(run)
    assert "The last line of metrics.jsonl is unfinished" in page.text
    assert "reward" in page.text


def test_one_step_alone_is_drawn(tmp_path):
    run = begin_fake_run(tmp_path)
    write_metrics(run, 1)
    assert "<circle" in Page(run).source


def test_rates_of_different_clips_are_not_compared(tmp_path):
    run = begin_fake_run(tmp_path)
    before, after = evaluations(60)[:2]
    run.write_evaluation(before)
    JsonLinesFile(run.evaluations_path).append(after.to_record() | {"text_normalizer_version": "2"})
    page = Page(run)
    assert "their rates do not compare" in page.text
    assert "points" not in page.text


def test_a_rise_is_called_a_rise(tmp_path):
    run = begin_fake_run(tmp_path)
    before, after = evaluations(60)[:2]
    run.write_evaluation(after)
    run.write_evaluation(before)
    assert "WER rose from 42.0" in Page(run).text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not the folder of a run: it has no config\.yml"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", "what\n", r"Line 1 of .*metrics\.jsonl"),
        ("completions.jsonl", '{"step": 1}\n', r"completion of step 1 .* completions\.jsonl"),
        ("evaluations.jsonl", '{"stage": "sft"}\n', r"evaluation of stage 'sft' .* evaluations\.jsonl"),
        ("config.yml", "just text", r"config\.yml holds no configuration keys"),
        ("config.yml", "a: [1", r"config\.yml is not YAML"),
        ("config.yml", "text_normalizer: unheard", "text_normalizer 'unheard', which this version does not have"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, name, text, message):
    run = begin_fake_run(tmp_path)
    (run.path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        build_report(run.path)


def test_the_first_and_the_last_step_are_among_the_shown_completions():
    sampled = [completion(step=step) for step in range(1, 101) for _ in range(20)]
    shown = select(sampled)
    steps = [each.step for each in shown]
    assert steps == sorted(steps, reverse=True)
    assert {1, 100} <= set(steps)
    assert len(shown) == 64
    assert select([]) == []


def test_spread_and_extremes_become_bands_and_everything_else_its_own_curve():
    records = [
        {"step": step, "phase": "grpo", "reward": 1.0, "reward_std": 0.5, "length/mean": 3.0, "length/min": 1.0,
         "length/max": 9.0, "wer": 0.2}
        for step in (1, 2)
    ]  # fmt: skip
    by_name = {series.name: series for series in series_of(records)}
    assert list(by_name) == ["reward", "length/mean", "wer"]
    np.testing.assert_array_equal(by_name["reward"].high, [1.5, 1.5])
    np.testing.assert_array_equal(by_name["length/mean"].low, [1.0, 1.0])
    assert by_name["wer"].low is None


def test_a_metric_that_only_some_steps_have_is_drawn_over_those_steps():
    records = [{"step": 1, "phase": "sft", "loss": 2.0}, {"step": 2, "phase": "sft", "loss": 1.0, "wer": 0.5}]
    assert [list(series.steps) for series in series_of(records)] == [[1, 2], [2]]
