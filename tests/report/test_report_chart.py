import json
import re
from xml.etree import ElementTree

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from audio_grpo.report.chart import HEIGHT, WIDTH, chart, ticks
from audio_grpo.report.series import MOST_POINTS, Series, running_mean, thin

ANY_VALUE = st.floats(-1e100, 1e100) | st.sampled_from([np.nan, np.inf, -np.inf])
ANY_SERIES = st.lists(ANY_VALUE, max_size=60).map(np.array).map(lambda values: values.astype(np.float64))


def series(values: np.ndarray, **more: np.ndarray) -> Series:
    return Series(name="kl", steps=np.arange(1, len(values) + 1), values=values, **more)


def parse(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure.replace("<wbr>", "").replace(" hidden", ""))


@given(ANY_SERIES)
def test_any_values_make_a_drawing_whose_points_lie_inside_it(values):
    svg = parse(chart(series(values))).find("svg")
    for line in svg.iter("polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
    assert len(json.loads(svg.get("data-points"))) == (len(values) if np.isfinite(values).any() else 0)


def test_every_finite_value_is_drawn_and_gaps_part_the_curve():
    figure = parse(chart(series(np.array([1.0, 2.0, np.nan, 3.0, np.nan, 4.0, 5.0]))))
    lines = [line.get("points").split() for line in figure.iter("polyline")]
    assert [len(line) for line in lines] == [2, 2]
    assert len(list(figure.iter("circle"))) == 1
    assert "2 not finite" in "".join(figure.itertext())


def test_higher_values_are_drawn_higher():
    figure = parse(chart(series(np.array([1.0, 3.0, 2.0]))))
    heights = [float(point.split(",")[1]) for point in next(figure.iter("polyline")).get("points").split()]
    assert heights[1] < heights[2] < heights[0]


def test_one_point_is_a_dot_and_no_point_says_so():
    assert "<circle" in chart(series(np.array([0.5])))
    assert "nothing to draw" in chart(series(np.array([])))
    assert "nothing to draw" in chart(series(np.array([np.nan, np.nan])))


def test_the_last_value_is_printed():
    output = parse(chart(series(np.array([0.5, 0.25])))).find("figcaption/output")
    assert output.text == "0.25"


def test_a_band_encloses_its_curve():
    values = np.array([1.0, 2.0, 3.0])
    figure = parse(chart(series(values, low=values - 1, high=values + 1)))
    corners = next(figure.iter("polygon")).get("points").split()
    heights = [float(corner.split(",")[1]) for corner in corners]
    curve = [float(point.split(",")[1]) for point in next(figure.iter("polyline")).get("points").split()]
    for place in range(3):
        assert heights[place] < curve[place] < heights[-1 - place]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(bottom, extent):
    top = bottom + extent
    marks = ticks(bottom, top)
    assert 1 <= len(marks) <= 4
    slack = 1e-9 * max(abs(bottom), abs(top))
    assert all(bottom - slack <= mark <= top + slack for mark in marks)


@given(arrays.arrays(np.float64, st.integers(1, 5000), elements=ANY_VALUE))
def test_thinning_keeps_peaks_and_ends_and_is_bounded(values):
    kept = thin(values)
    assert len(kept) <= MOST_POINTS + 2
    assert np.all(np.diff(kept) > 0)
    assert {0, len(values) - 1} <= set(kept)
    finite = values[np.isfinite(values)]
    if len(finite):
        shown = values[kept][np.isfinite(values[kept])]
        assert shown.max() == finite.max()
        assert shown.min() == finite.min()


@given(arrays.arrays(np.float64, st.integers(1, 200), elements=st.floats(-100, 100) | st.just(np.nan)))
def test_the_running_mean_is_the_mean_of_a_window(values):
    width = max(1, len(values) // 12)
    for place, mean in enumerate(running_mean(values)):
        first = place + width // 2 - width + 1
        window = values[max(0, first) : first + width]
        expected = np.nanmean(window) if np.isfinite(values[place]) else np.nan
        np.testing.assert_allclose(mean, expected, atol=1e-9)


def test_a_metric_name_is_escaped():
    name = "<script>alert(1)</script>"
    figure = chart(Series(name=name, steps=np.array([1]), values=np.array([1.0])))
    assert not re.search(r"<script", figure)
