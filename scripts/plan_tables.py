"""Writes docs/plans.md: the plans that the project promises, each with its command and what it printed."""

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from audio_grpo.config import initialize
from audio_grpo.parallel.libtpu import quiet_without_tpu
from audio_grpo.plan import Planner, limits, plan_chart, plan_text, remedies

PAGE = Path(__file__).parent.parent / "docs" / "plans.md"
DRAFT = PAGE.with_suffix(".draft")
"""Of the page, until all of its plans are made."""

HEAD = """# Plans

What `audio-grpo plan` says of the published models on Cloud TPU slices; `make plan-tables` writes this page again.
Programs are compiled by TPU's own compiler for slices that are not there. Arguments and temporaries are the compiler's,
GiB of each chip; the total adds what else lies in memory then: all weights, the optimizer's state, the reference,
caches. FLOPs and bytes are of each chip and one run, loops multiplied out; seconds are the least that all runs of a
step can take by the chip's peaks, so a real step takes longer. Rows of Pallas kernels for experts are counted as if
experts were chosen evenly. Clips and completions have the greatest length that is configured. The largest values, of
the first plan, come from a line through two compilations. Where a plan does not fit it says what would.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One plan of the page."""

    title: str
    topology: str
    arguments: tuple[str, ...]
    chart: str | None = None


OMNI = ("grpo_audio_qwen3_omni", "gradient_accumulation_steps=1")
ASR = ("grpo_audio_qwen3_asr", "per_device_batch_size=2", "gradient_accumulation_steps=4")
CASES = (
    Case(
        "Qwen3-Omni-30B-A3B, LoRA, v4-8",
        "v4-8",
        (*OMNI, "lora_rank=16", "ici_fsdp_parallelism=1", "ici_expert_parallelism=4"),
        "plan-omni-lora-v4-8.svg",
    ),
    Case("The test recipe, v4-8", "v4-8", ("grpo_audio_qwen3_omni_test",)),
    *(
        Case(
            f"Qwen3-Omni-30B-A3B, all weights but the tower's, {topology}",
            topology,
            (*OMNI, "per_device_batch_size=1", f"ici_fsdp_parallelism={fsdp}", f"ici_expert_parallelism={expert}"),
        )
        for topology, fsdp, expert in (("v4-64", 2, 16), ("v5p-16", 1, 8), ("v6e-32", 2, 16))
    ),
    *(
        Case(
            f"Qwen3-ASR-{size.upper()}, all weights but the tower's, one {chip} chip",
            topology,
            (*ASR, f"model_name=qwen3-asr-{size}"),
        )
        for size in ("0.6b", "1.7b")
        for chip, topology in (("v4", "v4-2"), ("v5e", "v5e-1"), ("v5p", "v5p-2"), ("v6e", "v6e-1"))
    ),
)


def section(case: Case) -> str:
    """A plan's command and text."""
    config = initialize(list(case.arguments))
    planner = Planner(case.topology, config)
    started = time.perf_counter()
    plan = planner.plan()
    seconds = time.perf_counter() - started
    print(f"{case.title}: {seconds:.0f} s, peak {plan.peak.total / (1 << 30):.2f} GiB", file=sys.stderr)
    found, picture = [], ""
    if case.chart:
        found = limits(planner, config, plan)
        (PAGE.parent / case.chart).write_text(plan_chart(plan))
        picture = f"\n![memory and time by program]({case.chart})\n"
    preset, *keys = case.arguments
    command = shlex.join(["audio-grpo", "plan", preset, "--topology", case.topology, *keys])
    text = plan_text(plan, found, list(remedies(config, plan)))
    return f"## {case.title}\n\n`{command}`, compiled in {seconds:.0f} s:\n\n{text}\n{picture}"


if __name__ == "__main__":
    quiet_without_tpu()
    pages = [HEAD]
    for case in CASES:
        pages.append(section(case))
        DRAFT.write_text("\n".join(pages))
    DRAFT.replace(PAGE)
