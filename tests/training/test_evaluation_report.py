import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.errors import UserError
from audio_grpo.training.evaluation_report import ErrorRates, EvaluationReport, Utterance

COUNT = st.integers(0, 10**9)
RATES = st.builds(
    ErrorRates,
    clips=COUNT,
    reference_words=COUNT,
    substitutions=COUNT,
    deletions=COUNT,
    insertions=COUNT,
    reference_characters=COUNT,
    cer_edits=COUNT,
)
REPORTS = st.builds(
    EvaluationReport,
    stage=st.text(),
    step=COUNT,
    text_normalizer=st.sampled_from(["basic", "cjk"]),
    text_normalizer_version=st.text(),
    rates=RATES,
    by_language=st.dictionaries(st.text(), RATES, max_size=3),
    by_duration=st.dictionaries(st.text(), RATES, max_size=3),
    utterances=st.lists(
        st.builds(Utterance, id=st.text(), reference=st.text(), hypothesis=st.text(), wer=st.floats(0, 1e6)), max_size=3
    ).map(tuple),
)


def rates(**counts: int) -> ErrorRates:
    none = dict.fromkeys(("clips", "reference_words", "substitutions", "deletions", "insertions"), 0)
    return ErrorRates(**(none | {"reference_characters": 0, "cer_edits": 0} | counts))


@given(REPORTS)
def test_any_report_comes_back_from_its_line(report):
    assert EvaluationReport.from_json(report.to_json()) == report


def test_rates_are_edits_for_each_reference_unit():
    some = rates(reference_words=20, substitutions=3, deletions=2, insertions=1, reference_characters=90, cer_edits=9)
    assert some.wer == 6 / 20
    assert some.cer == 9 / 90


def test_without_a_reference_the_rate_is_the_number_of_edits():
    assert rates().wer == rates().cer == 0
    assert rates(insertions=3, cer_edits=12).wer == 3
    assert rates(insertions=3, cer_edits=12).cer == 12


def test_the_line_has_rates_and_counts_beside_stage_and_step():
    some = rates(reference_words=20, substitutions=3, clips=2)
    report = EvaluationReport(
        stage="grpo",
        step=60,
        text_normalizer="basic",
        text_normalizer_version="1",
        rates=some,
        by_language={"Arabic": some},
        utterances=(Utterance(id="a", reference="ذهب", hypothesis="", wer=1.0),),
    )
    line = json.loads(report.to_json())
    assert line["stage"] == "grpo"
    assert line["wer"] == line["by_language"]["Arabic"]["wer"] == 3 / 20
    assert line["utterances"] == [{"id": "a", "reference": "ذهب", "hypothesis": "", "wer": 1.0}]


def test_a_line_with_other_fields_is_refused():
    with pytest.raises(UserError, match="stage 'sft' does not have the fields of an evaluation"):
        EvaluationReport.from_json('{"stage": "sft", "wer": 0.5}')
