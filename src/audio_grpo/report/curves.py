"""The curves of a run: one small chart for each metric, by phase and by topic."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64

from audio_grpo.report.chart import chart
from audio_grpo.report.formats import compact
from audio_grpo.report.markup import Html, join, tag
from audio_grpo.report.run_data import RunData
from audio_grpo.report.series import MOST_POINTS, Series
from audio_grpo.training.evaluation_report import EvaluationReport
from audio_grpo.training.json_lines import Record

_TOPICS: dict[str, tuple[str, ...]] = {
    "Reward": ("reward", "reward_std", "frac_reward_zero_std", "rewards/", "frac_reward_zero_std/"),
    "Transcription errors": ("wer", "errors/", "answers/"),
    "Policy": ("loss", "policy_loss", "kl", "entropy", "grad_norm", "clip_ratio/", "learning_rate", "skipped_updates"),
    "Transcripts": ("transcript/",),
    "Gradient norms by part": ("grad_norm/",),
    "Skipped updates by cause": ("skipped_updates/",),
    "Completions": ("completions/",),
    "Sampler and learner": ("sampling/",),
    "Speed": ("step_time", "tokens_per_second", "num_tokens", "audio_seconds", "seconds/", "memory/"),
    "Rollout": ("rollout/", "dynamic_sampling/", "clips/"),
}
"""Topic to the metrics it shows, in this order; a name that ends in "/" stands for all that begin with it."""

_OTHER = "Other"


def curves(run: RunData) -> Html:
    """A section for each phase, and the curves of evaluations made on the way."""
    if not run.metrics:
        return tag("p", "No metrics yet.", class_="note")
    note = (
        "Thin lines are single steps, bold ones a running mean, bands one standard deviation or smallest to largest. "
        f"Runs of more than {MOST_POINTS} steps show each stretch's extremes."
    )
    phases = [_phase(name, records) for name, records in run.metrics.items()]
    return join(tag("p", note, class_="note"), *phases, _evaluations(run.evaluations))


def series_of(records: list[Record]) -> list[Series]:
    """One series for each metric; spreads and extremes become bands of their mean and are not shown twice."""
    names = list(dict.fromkeys(name for record in records for name in record if name not in ("step", "phase")))
    in_bands = {edge for name in names for edge in _band_edges(name, names)}
    return [_series(records, name, _band_edges(name, names)) for name in names if name not in in_bands]


def _band_edges(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Names of the metrics that span the band around `name`: its spread, or its smallest and largest value."""
    if name.endswith("/mean"):
        stem = name.removesuffix("mean")
        candidates = [(stem + "std",), (stem + "min", stem + "max")]
    elif "/mean_" in name:
        candidates = [(name.replace("/mean_", "/min_"), name.replace("/mean_", "/max_"))]
    else:
        candidates = [(name + "_std",)]
    return next((edges for edges in candidates if all(edge in names for edge in edges)), ())


def _series(records: list[Record], name: str, edges: tuple[str, ...]) -> Series:
    shown = [record for record in records if name in record]

    def column(key: str) -> Float64[np.ndarray, "n"]:
        return np.array([record.get(key, np.nan) for record in shown], dtype=np.float64)

    steps = np.array([record["step"] for record in shown], dtype=np.int64)
    values, around = column(name), [column(edge) for edge in edges]
    if not around:
        return Series(name=name, steps=steps, values=values)
    if len(around) == 1:
        low, high, detail = values - around[0], values + around[0], f"± {compact(around[0][-1])}"
    else:
        low, high, detail = *around, f"{compact(around[0][-1])} – {compact(around[1][-1])}"
    return Series(name=name, steps=steps, values=values, low=low, high=high, detail=detail)


def _phase(name: str, records: list[Record]) -> Html:
    by_topic: dict[str, list[tuple[int, Series]]] = {topic: [] for topic in [*_TOPICS, _OTHER]}
    for series in series_of(records):
        topic, place = _topic(series.name)
        by_topic[topic].append((place, series))
    groups = [
        _group(topic, [series for _, series in sorted(members, key=lambda member: (member[0], member[1].name))])
        for topic, members in by_topic.items()
        if members
    ]
    return join(tag("h3", name.upper()), tag("div", *groups, class_="topics"))


def _topic(metric: str) -> tuple[str, int]:
    for topic, members in _TOPICS.items():
        for place, member in enumerate(members):
            if metric == member or (member.endswith("/") and metric.startswith(member)):
                return topic, place
    return _OTHER, 0


def _group(title: str, members: list[Series]) -> Html:
    charts = tag("div", *(chart(series) for series in members), class_="charts")
    return tag("div", tag("h4", title), charts, class_=f"topic of-{len(members)}")


def _evaluations(reports: list[EvaluationReport]) -> Html | None:
    """WER and CER over the steps of every stage that was evaluated more than once."""
    members = []
    for stage in dict.fromkeys(report.stage for report in reports):
        of_stage = [report for report in reports if report.stage == stage]
        if len(of_stage) > 1:
            steps = np.array([report.step for report in of_stage], dtype=np.int64)
            members += [
                Series(name=f"{stage}: WER", steps=steps, values=np.array([each.rates.wer for each in of_stage])),
                Series(name=f"{stage}: CER", steps=steps, values=np.array([each.rates.cer for each in of_stage])),
            ]
    return (
        join(tag("h3", "Evaluations on the way"), tag("div", _group("Held-out clips", members), class_="topics"))
        if members
        else None
    )
