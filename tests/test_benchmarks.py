"""The benchmarks' own parts; what they measure is measured by `make bench`."""

import sys
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from audio_grpo.audio import audio_token_count

FOLDER = Path(__file__).parent.parent / "benchmarks"
MACHINE = {
    "started": "2026-01-02T03:04:05+00:00",
    "load": {"before": 0.5, "after": 1.5},
    "machine": {"processor": "abacus", "cores": 2, "memory_gib": 8.0},
    "versions": {"jax": "1"},
    "runs": 3,
}


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return import_module


def test_prompts_hold_as_many_placeholders_as_their_clips_give(benchmarks):
    reference_work = benchmarks("reference_work")
    for seconds in (1.0, 5.0, 15.0, 30.0):
        for request in reference_work.requests(reference_work.Work(prompts=2, seconds=seconds), audio_pad=7):
            assert (request.tokens == 7).sum() == audio_token_count(request.audio_features.shape[1])
            assert request.true_length == len(request.tokens)


def test_tokens_after_a_stop_token_or_beyond_a_limit_are_not_wanted(benchmarks):
    reference_work = benchmarks("reference_work")
    stop, other = 5, reference_work.VOCAB - 1
    sampled = np.asarray([[other, stop, other, stop], [other, other, other, other], [stop, stop, stop, stop]])
    by_stops = reference_work.Work(prompts=3, generations=1, tokens=4, lengths="stops")
    assert reference_work.wanted_tokens(sampled, by_stops) == 2 + 4 + 1
    by_limits = reference_work.Work(prompts=1, generations=3, tokens=3, lengths="limits")
    assert reference_work.wanted_tokens(sampled, by_limits) == 3 * by_limits.limits[0]
    assert reference_work.wanted_tokens(sampled, reference_work.Work(prompts=3, generations=1, tokens=2)) == 6


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "side.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "from worker import serve\n"
        "def start(base):\n"
        "    print('a library is loud')\n"
        "    return {'add': lambda number: {'sum': base + number}, 'fail': lambda: {}['nothing']}\n"
        "serve(start)\n"
    )
    return str(path)


def test_a_side_answers_one_job_after_another(benchmarks, script):
    with benchmarks("worker").Side(Path(sys.executable), script, base=3) as side:
        assert side.ask("add", number=4) == {"sum": 7}
        assert side.ask("add", number=5) == {"sum": 8}


def test_a_side_that_fails_is_told(benchmarks, script):
    with (
        benchmarks("worker").Side(Path(sys.executable), script, base=3) as side,
        pytest.raises(RuntimeError, match="ended during fail with status 1"),
    ):
        side.ask("fail")


def test_the_page_tells_ratios_with_the_machine_and_its_load(benchmarks):
    ours = {"seconds": 2.0, "tokens_per_second": 1234.0, "first_seconds": 9.5}
    peer = {"seconds": 25.0, "tokens_per_second": 98.7}
    case = {"name": "reference work", "ours": ours, "peer": peer, "ratio": 12.5}
    text = benchmarks("page").page({"rollouts": {**MACHINE, "results": [case]}})
    assert "| reference work | 2 | 1,234 | 25 | 98.7 | **12.5** | 9.5 |" in text
    assert "abacus" in text and "load average 0.5 before, 1.5 after" in text


def test_curves_rise_with_their_values(benchmarks):
    cases = [{"work": {"slots": slots}, "tokens_per_second": 10.0 * slots} for slots in (8, 16, 32)]
    svg = ElementTree.fromstring(benchmarks("curves").scaling_chart({"slots": cases}))
    heights = [float(dot.get("cy")) for dot in svg.iter("{http://www.w3.org/2000/svg}circle")]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] - heights[1] == pytest.approx((heights[1] - heights[2]) / 2, abs=0.2)


@pytest.mark.slow
def test_a_short_soak_loses_nothing(benchmarks):
    told = benchmarks("soak").soak(300)
    assert told["requests"] == 300 and told["at_fault"] == 3 and told["cancelled"] > 3
