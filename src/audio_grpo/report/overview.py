"""The top of a report: which run it is, what came of it and what is missing."""

from audio_grpo.report.formats import compact, duration, percent, points
from audio_grpo.report.markup import Content, Html, join, table, tag
from audio_grpo.report.run_data import RunData
from audio_grpo.training.evaluation_report import ErrorRates, EvaluationReport

_FACTS = {
    "Model": "model_name",
    "Weights from": "load_parameters_path",
    "Training data": "grain_train_files",
    "Evaluation data": "grain_eval_files",
    "Template": "template",
    "Normaliser": "text_normalizer",
    "Rewards": "reward_functions",
    "Generations": "num_generations",
    "Learning rate": "learning_rate",
    "KL weight": "grpo_beta",
    "Steps": "steps",
    "Seed": "seed",
}
"""Label to configuration key."""

_LONGEST_NARROW_FACT = 60


def heading(run: RunData) -> Html:
    """The run's name, and what the report does not have."""
    missing = tag("aside", tag("h2", "Not in this report"), tag("ul", *(tag("li", each) for each in run.missing)))
    title = tag("header", tag("p", "audio-grpo run", class_="overline"), tag("h1", run.folder.path.name, dir="auto"))
    return join(title, missing if run.missing else None)


def result(run: RunData) -> Html:
    """Corpus error rates after each stage."""
    stages = last_of_each_stage(run.evaluations)
    if not stages:
        return tag("p", "No evaluation yet.", class_="note")
    previous: list[EvaluationReport | None] = [None, *stages[:-1]]
    tiles = [_tile(before, after) for before, after in zip(previous, stages, strict=True)]
    verdict = tag("p", _verdict(stages[-2], stages[-1]), class_="lead") if len(stages) > 1 else None
    return join(verdict, tag("div", *tiles, class_="tiles"), _stage_table(stages))


def setup(run: RunData) -> Html:
    """The configuration's main keys, times, devices and versions."""
    facts = {label: run.config.get(key) for label, key in _FACTS.items()}
    for phase, records in run.metrics.items():
        times = [record["step_time"] for record in records if "step_time" in record]
        if times:
            facts[f"{phase.upper()} time"] = f"{duration(sum(times))} in {len(times)} steps"
    if run.environment:
        facts["Devices"] = run.environment["devices"]
        facts["Versions"] = ", ".join(f"{name} {version}" for name, version in run.environment["versions"].items())
    return tag("dl", *(_fact(label, value) for label, value in facts.items() if value is not None))


def last_of_each_stage(reports: list[EvaluationReport]) -> list[EvaluationReport]:
    """Stages in the order they came, each with its last evaluation."""
    return list({report.stage: report for report in reports}.values())


def _comparable(before: EvaluationReport, after: EvaluationReport) -> bool:
    return _counted(before) == _counted(after)


def _counted(report: EvaluationReport) -> tuple[object, ...]:
    """What rates must have in common for their difference to mean something."""
    return report.rates.clips, report.rates.reference_words, report.text_normalizer, report.text_normalizer_version


def _verdict(before: EvaluationReport, after: EvaluationReport) -> str:
    if not _comparable(before, after):
        return f"“{before.stage}” and “{after.stage}” were evaluated on different clips: their rates do not compare."
    old, new = before.rates.wer, after.rates.wer
    if new == old:
        return f"From “{before.stage}” to “{after.stage}”, corpus WER stayed at {percent(new)}."
    verb = "fell" if new < old else "rose"
    return f"From “{before.stage}” to “{after.stage}”, corpus WER {verb} from {percent(old)} to {percent(new)}."


def _tile(before: EvaluationReport | None, after: EvaluationReport) -> Html:
    difference = None
    if before and _comparable(before, after):
        fell = after.rates.wer < before.rates.wer
        text = f"{points(after.rates.wer - before.rates.wer)} points"
        difference = tag("span", text, class_="good" if fell else "bad")
    return tag(
        "div",
        tag("p", after.stage, class_="overline"),
        tag("p", percent(after.rates.wer), class_="figure"),
        tag("p", "WER", difference),
        class_="tile",
    )


def _stage_table(stages: list[EvaluationReport]) -> Html:
    head: list[Content] = ["Stage", "Step", "WER", "CER", "Substituted", "Deleted", "Inserted", "Words", "Clips"]
    rows = [
        [each.stage, compact(each.step), percent(each.rates.wer), percent(each.rates.cer), *count_cells(each.rates)]
        for each in stages
    ]
    return table(head, rows)


def count_cells(rates: ErrorRates) -> list[Content]:
    """Substitutions, deletions, insertions, words and clips."""
    counts = (rates.substitutions, rates.deletions, rates.insertions, rates.reference_words, rates.clips)
    return [compact(count) for count in counts]


def _fact(label: str, value: object) -> Html:
    if isinstance(value, list):
        text = ", ".join(str(each) for each in value)
    else:
        text = compact(value) if isinstance(value, float) else str(value)
    is_wide = len(text) > _LONGEST_NARROW_FACT
    return tag("div", tag("dt", label), tag("dd", text), class_="wide" if is_wide else None)
