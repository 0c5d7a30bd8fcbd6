import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.report.formats import compact, duration, percent, points, signed


@given(st.floats(-1e300, 1e300, allow_subnormal=False))
def test_a_compact_number_is_short_and_close(value):
    text = compact(value)
    assert len(text) <= 11
    read = float(text.replace("−", "-").replace(",", ""))
    assert math.isclose(read, value, rel_tol=6e-3) or read == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12480.0, "12,480"),
        (9999.9, "10,000"),
        (-0.18161, "−0.1816"),
        (3.1e-7, "3.1e−7"),
        (math.nan, "nan"),
        (-math.inf, "−inf"),
    ],
)
def test_compact_numbers_by_example(value, text):
    assert compact(value) == text


def test_rates_differences_and_durations_by_example():
    assert percent(1.2346) == "123.5\N{NO-BREAK SPACE}%"
    assert points(-0.0241) == "−2.4"
    assert [signed(1.25), signed(-0.5), signed(math.nan)] == ["+1.25", "−0.50", "nan"]
    assert [duration(seconds) for seconds in (11.6, 200, 7500)] == ["12 s", "3 min 20 s", "2 h 05 min"]
