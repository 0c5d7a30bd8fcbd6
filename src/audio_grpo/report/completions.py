"""Sampled completions: what was said, what was heard, and what it was worth."""

import base64
from itertools import groupby

import numpy as np

from audio_grpo.report.diff import diff, legend
from audio_grpo.report.formats import compact, percent, signed
from audio_grpo.report.markup import Content, Html, breakable, join, table, tag
from audio_grpo.report.run_data import RunData
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.telemetry import SampledCompletion

_MOST_STEPS = 8
_MOST_COMPLETIONS_PER_STEP = 8


def completions(run: RunData) -> Html:
    """The completions of some steps, the first and the last among them, by clip."""
    shown = select(run.completions)
    if not shown:
        return tag("p", "No completions yet.", class_="note")
    note = f"{len(shown)} of {len(run.completions)} sampled completions; all are in {run.folder.completions_path.name}."
    clips = [_clip(run, list(members)) for _, members in groupby(shown, lambda each: (each.step, each.clip_id))]
    return join(tag("p", note, class_="note"), legend(), *clips)


def select(sampled: list[SampledCompletion]) -> list[SampledCompletion]:
    """Those of evenly spaced steps, the latest step first, a bounded number of each step."""
    steps = sorted({each.step for each in sampled})
    spread = np.linspace(0, len(steps) - 1, min(_MOST_STEPS, len(steps))).round().astype(int)
    chosen = [steps[at] for at in reversed(spread)]
    return [
        each
        for step in chosen
        for each in [of_step for of_step in sampled if of_step.step == step][:_MOST_COMPLETIONS_PER_STEP]
    ]


def _clip(run: RunData, members: list[SampledCompletion]) -> Html:
    first = members[0]
    names = list(dict.fromkeys(name for each in members for name in each.rewards))
    head: list[Content] = ["Heard", "WER", *map(breakable, names), "Reward", "Advantage", "Tokens"]
    rows = [[_heard(run, each), *_numbers(each, names)] for each in members]
    return tag(
        "article",
        tag(
            "div",
            tag("span", f"Step {first.step}", class_="step"),
            tag("span", first.clip_id, class_="metric", dir="auto"),
            tag("span", first.language) if first.language else None,
            _player(run.folder, first.audio),
            class_="clip",
        ),
        tag("p", first.reference, class_="reference", dir="auto"),
        table(head, rows),
    )


def _heard(run: RunData, each: SampledCompletion) -> Html:
    if each.hypothesis is None:
        heard = tag("p", "no answer", class_="alarm")
    else:
        heard = diff(each.reference, each.hypothesis, run.normalizer)
    raw = tag("details", tag("summary", "whole completion"), tag("pre", each.completion, dir="auto"))
    return join(heard, raw)


def _numbers(each: SampledCompletion, names: list[str]) -> list[Content]:
    rewards = [compact(each.rewards[name]) if name in each.rewards else None for name in names]
    cut = tag("span", "cut off", class_="alarm") if each.finish_reason == "length" else None
    return [
        percent(each.wer),
        *rewards,
        tag("strong", compact(each.reward)),
        tag("span", signed(each.advantage), class_=_worth(each.advantage)),
        join(str(each.length), cut),
    ]


def _worth(advantage: float) -> str | None:
    if advantage > 0:
        return "good"
    return "bad" if advantage < 0 else None


def _player(folder: RunFolder, name: str | None) -> Html:
    path = None if name is None else folder.clips / name
    if path is None or not path.exists():
        return tag("span", "audio not kept", class_="note")
    data = base64.b64encode(path.read_bytes()).decode()
    return tag("audio", controls=True, preload="metadata", src=f"data:audio/flac;base64,{data}")
