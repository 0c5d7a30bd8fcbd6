"""One small line chart as inline SVG."""

import itertools
import json
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from audio_grpo.report.formats import compact
from audio_grpo.report.markup import Html, breakable, join, tag
from audio_grpo.report.series import Series, running_mean, thin

WIDTH, HEIGHT = 300, 124
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 8, 20
_SMOOTHED_FROM = 30


@dataclass(frozen=True, slots=True)
class _Axes:
    """Places steps and values on the drawing."""

    first: float
    last: float
    bottom: float
    top: float

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def chart(series: Series) -> Html:
    """The metric's name, its last value and its curve, with a running mean over a long one."""
    last = compact(series.values[-1]) if len(series.values) else "no values"
    gaps = int(np.sum(~np.isfinite(series.values)))
    caption = tag(
        "figcaption",
        tag("span", breakable(series.name), class_="metric"),
        tag("output", last, data_last=last),
        tag("small", series.detail),
        tag("small", f"{gaps} not finite", class_="alarm") if gaps else None,
    )
    return tag("figure", caption, _drawing(series), class_="chart")


def ticks(bottom: float, top: float) -> list[float]:
    """One to four round numbers between `bottom` and `top`, which differ."""
    rough = (top - bottom) / 3
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    return [number * step for number in range(math.ceil(bottom / step), math.floor(top / step) + 1)]


def _drawing(series: Series) -> Html:
    if not np.isfinite(series.values).any():
        return _svg(series, tag("text", "nothing to draw", x=WIDTH / 2, y=HEIGHT / 2, text_anchor="middle"), points=[])
    axes = _fit(series)
    kept = thin(series.values)
    steps, values = series.steps[kept], series.values[kept]
    is_long = len(series.values) >= _SMOOTHED_FROM
    return _svg(
        series,
        _grid(axes),
        _band(axes, series, kept),
        _line(axes, steps, values, "raw" if is_long else "curve"),
        _line(axes, steps, running_mean(series.values)[kept], "curve") if is_long else None,
        tag("line", class_="cursor", y1=_TOP, y2=HEIGHT - _BOTTOM, hidden=True),
        points=[
            [_pixel(axes.x(step)), f"step {step}", compact(value)] for step, value in zip(steps, values, strict=True)
        ],
    )


def _svg(series: Series, *children: Html | None, points: list[list[float | str]]) -> Html:
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{series.name} over {len(series.values)} steps",
        data_points=json.dumps(points, ensure_ascii=False, separators=(",", ":")),
    )


def _fit(series: Series) -> _Axes:
    edges = [edge[np.isfinite(edge)] for edge in (series.values, series.low, series.high) if edge is not None]
    bottom = min(float(edge.min()) for edge in edges if len(edge))
    top = max(float(edge.max()) for edge in edges if len(edge))
    margin = 0.06 * (top - bottom)
    if margin <= 1e-9 * max(abs(bottom), abs(top)):  # a flat curve has no range of its own
        margin = 0.1 * max(abs(bottom), abs(top)) or 1.0
    return _Axes(float(series.steps[0]), float(series.steps[-1]), bottom - margin, top + margin)


def _grid(axes: _Axes) -> Html:
    lines = [
        join(
            tag("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_pixel(axes.y(value)), y2=_pixel(axes.y(value))),
            tag("text", compact(value), x=_LEFT - 6, y=_pixel(axes.y(value) + 3), text_anchor="end"),
        )
        for value in ticks(axes.bottom, axes.top)
    ]
    anchors = {axes.first: "start", axes.last: "end"} if axes.last > axes.first else {axes.first: "middle"}
    labels = [
        tag("text", compact(step), x=_pixel(axes.x(step)), y=HEIGHT - 5, text_anchor=anchor)
        for step, anchor in anchors.items()
    ]
    return join(*lines, *labels)


def _band(axes: _Axes, series: Series, kept: Int64[np.ndarray, "k"]) -> Html | None:
    if series.low is None or series.high is None:
        return None
    steps, low, high = series.steps[kept], series.low[kept], series.high[kept]
    areas = []
    for stretch in _stretches(np.isfinite(low) & np.isfinite(high)):
        edge = [
            *zip(steps[stretch], high[stretch], strict=True),
            *zip(steps[stretch][::-1], low[stretch][::-1], strict=True),
        ]
        areas.append(tag("polygon", class_="band", points=_path(axes, edge)))
    return join(*areas)


def _line(axes: _Axes, steps: Int64[np.ndarray, "k"], values: Float64[np.ndarray, "k"], kind: str) -> Html:
    pieces = []
    for stretch in _stretches(np.isfinite(values)):
        ends = list(zip(steps[stretch], values[stretch], strict=True))
        if len(ends) == 1:
            step, value = ends[0]
            pieces.append(tag("circle", class_=kind, cx=_pixel(axes.x(step)), cy=_pixel(axes.y(value)), r=2.5))
        else:
            pieces.append(tag("polyline", class_=kind, points=_path(axes, ends)))
    return join(*pieces)


def _stretches(shown: Bool[np.ndarray, "k"]) -> list[slice]:
    """Runs of neighbours that are all shown."""
    runs = [list(run) for is_shown, run in itertools.groupby(range(len(shown)), lambda at: shown[at]) if is_shown]
    return [slice(run[0], run[-1] + 1) for run in runs]


def _path(axes: _Axes, ends: list[tuple[float, float]]) -> str:
    return " ".join(f"{_pixel(axes.x(step))},{_pixel(axes.y(value))}" for step, value in ends)


def _pixel(coordinate: float) -> float:
    return round(float(coordinate), 1)
