"""Runs the benchmarks and writes docs/benchmarks.md, .json and a chart; `make bench` calls it.

    python benchmarks/run.py [--section learner …] [--runs 3] [--out docs] [--quick]

Each section is one run, in which the sides take turns on the same two cores. Sections that are not asked for keep the
results that they have. An hour or two in all; the machine should have nothing else to do.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from curves import scaling_chart
from measure import OURS, PEER, SECTIONS, Setting
from page import page
from reference_work import Work
from worker import Side

DOCS = Path("docs")
CORES = 2
QUICK = Work(prompts=2, generations=2, tokens=8, seconds=1.0)


def main() -> None:
    """Measure the sections that are asked for, and write each as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="Again and again; default: all.")
    parser.add_argument("--runs", type=int, default=3, help="Of which medians are taken.")
    parser.add_argument("--out", type=Path, default=DOCS, help="An existing folder.")
    parser.add_argument("--quick", action="store_true", help="A tiny work, to try the benchmarks themselves.")
    options = parser.parse_args()
    if options.quick and options.out == DOCS:
        parser.error("--quick measures nothing worth keeping: give it an --out of its own")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(f"{folder}/model", options.runs, QUICK if options.quick else Work())
        versions = _prepare(setting)
        for name in options.section or SECTIONS:
            print(f"{name} …", flush=True)
            _keep(options.out, name, _measured(name, setting, versions))


def _prepare(setting: Setting) -> dict[str, str]:
    """Make the model that both sides run; returns what they stand on."""
    with Side(OURS, "ours.py") as ours, Side(PEER, "peer.py") as peer:
        ours.ask("publish", folder=setting.model)
        return {"Python": platform.python_version(), **ours.ask("versions"), **peer.ask("versions")}


def _measured(name: str, setting: Setting, versions: dict[str, str]) -> dict[str, Any]:
    started, load = datetime.datetime.now(datetime.UTC), os.getloadavg()[0]
    results = SECTIONS[name](setting)
    return {
        "started": started.isoformat(timespec="seconds"),
        "load": {"before": load, "after": os.getloadavg()[0]},
        "machine": _machine(),
        "versions": versions,
        "runs": setting.runs,
        "results": results,
    }


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": processor, "cores": CORES, "memory_gib": round(memory / 2**30, 1)}


def _keep(out: Path, name: str, measured: dict[str, Any]) -> None:
    path = out / "benchmarks.json"
    sections = json.loads(path.read_text()) if path.exists() else {}
    sections = {key: value for key, value in {**sections, name: measured}.items() if key in SECTIONS}
    path.write_text(json.dumps(sections, indent=1) + "\n")
    (out / "benchmarks.md").write_text(page(sections))
    if name == "scaling":
        (out / "benchmarks-scaling.svg").write_text(scaling_chart(measured["results"]))


if __name__ == "__main__":
    main()
