"""Error rates by language and by duration, and the best and worst utterances."""

from collections.abc import Mapping

from audio_grpo.report.diff import diff
from audio_grpo.report.formats import percent
from audio_grpo.report.markup import Content, Html, join, table, tag
from audio_grpo.report.overview import count_cells, last_of_each_stage
from audio_grpo.report.run_data import RunData
from audio_grpo.text.normalizers import get_normalizer
from audio_grpo.training.evaluation_report import ErrorRates, EvaluationReport, Utterance

_MOST_UTTERANCES = 8


def evaluation(run: RunData) -> Html:
    """Each stage's rates side by side, and utterances of the last evaluation."""
    stages = last_of_each_stage(run.evaluations)
    if not stages:
        return tag("p", "No evaluation yet.", class_="note")
    return join(
        _breakdown("Language", stages, [each.by_language for each in stages]),
        _breakdown("Duration", stages, [each.by_duration for each in stages]),
        _utterances(stages[-1]),
    )


def _breakdown(title: str, stages: list[EvaluationReport], rates: list[Mapping[str, ErrorRates]]) -> Html | None:
    """WER of every stage, then the last stage's counts."""
    names = list(dict.fromkeys(name for stage in rates for name in stage))
    if not names:
        return None
    head: list[Content] = [title, *(f"WER {stage.stage}" for stage in stages)]
    head += ["CER", "Substituted", "Deleted", "Inserted", "Words", "Clips"]
    return join(tag("h3", f"By {title.lower()}"), table(head, [_row(name, rates) for name in names]))


def _row(name: str, rates: list[Mapping[str, ErrorRates]]) -> list[Content]:
    rates_of_stages: list[Content] = [percent(stage[name].wer) if name in stage else "–" for stage in rates]
    last = rates[-1].get(name)
    if last is None:
        return [name, *rates_of_stages, *["–"] * 6]
    return [name, *rates_of_stages, percent(last.cer), *count_cells(last)]


def _utterances(report: EvaluationReport) -> Html | None:
    if not report.utterances:
        return None
    worst_first = sorted(report.utterances, key=lambda each: each.wer, reverse=True)
    note = f"Of {report.rates.clips} clips, the evaluation “{report.stage}” kept {len(worst_first)} utterances."
    if len(worst_first) <= 2 * _MOST_UTTERANCES:
        lists = [tag("h3", "Utterances, worst first"), _listing(worst_first, report)]
    else:
        best_first = worst_first[: -_MOST_UTTERANCES - 1 : -1]
        lists = [tag("h3", "Worst utterances"), _listing(worst_first[:_MOST_UTTERANCES], report)]
        lists += [tag("h3", "Best utterances"), _listing(best_first, report)]
    return join(*lists, tag("p", note, class_="note"))


def _listing(utterances: list[Utterance], report: EvaluationReport) -> Html:
    head: list[Content] = ["Clip", "Reference and what was heard", "WER"]
    rows: list[list[Content]] = [
        [
            tag("span", each.id, class_="metric", dir="auto"),
            join(
                tag("p", each.reference, dir="auto", class_="reference"),
                diff(each.reference, each.hypothesis, get_normalizer(report.text_normalizer)),
            ),
            percent(each.wer),
        ]
        for each in utterances
    ]
    return table(head, rows, text_columns=2)
