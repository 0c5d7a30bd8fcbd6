"""A plan in words and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from audio_grpo.plan.decoding import DecodeStep
from audio_grpo.plan.limits import Limit
from audio_grpo.plan.run_plan import ProgramPlan, RunPlan
from audio_grpo.training.memory import GIB

_BUFFERS_TOLD = 5


def plan_text(plan: RunPlan, limits: Sequence[Limit], remedies: Sequence[str]) -> str:
    """Tables for a terminal or a Markdown page."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    work = plan.work
    kept = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.kept.items() if size)
    lines = [
        f"{plan.model_name} on {plan.topology}: {plan.chips} x {plan.chip.name} of {plan.chip.memory / GIB:.2f} GiB, "
        f"{mesh}",
        f"a step: {work.prompts} prompts of {work.prompt_length} tokens ({work.frames / 100:g} s), "
        f"{work.generations} completions of {work.completion_length} each, {work.shape.slots} slots",
        f"kept all the time, GiB a chip: {kept}; while sampling, cache {plan.cache / GIB:.2f}",
        "",
        "| program | runs | arguments | temporaries | total GiB | TFLOP | GB moved | GB sent | seconds | bound by |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(program) for program in plan.programs),
        "",
    ]
    lines += [_decoding(program.decoding) for program in plan.programs if program.decoding]
    if not math.isnan(plan.step_seconds):
        lines += [
            f"least time of a step {plan.step_seconds:.3g} s: {plan.tokens_per_second:.0f} tokens and "
            f"{plan.clips_per_second:.3g} clips a second",
        ]
    lines += [f"{limit.key} {limit.now:g}: at most about {_largest(plan, limit)} fits" for limit in limits]
    lines += ["fits" if plan.fits else "does not fit", *remedies]
    return "\n".join(lines)


def plan_json(plan: RunPlan, limits: Sequence[Limit], remedies: Sequence[str]) -> dict[str, Any]:
    """The same as plain values; sizes in bytes, rates a second."""
    return {
        "model_name": plan.model_name,
        "topology": plan.topology,
        "chips": plan.chips,
        "chip": {"name": plan.chip.name, "memory": plan.chip.memory},
        "mesh": plan.mesh,
        "kept": plan.kept,
        "cache": plan.cache,
        "programs": [_program_json(program) for program in plan.programs],
        "peak": {"phase": plan.peak.phase, "total": plan.peak.total},
        "step_seconds": _finite(plan.step_seconds),
        "tokens_per_second": _finite(plan.tokens_per_second),
        "clips_per_second": _finite(plan.clips_per_second),
        "largest": {limit.key: _finite(limit.largest) for limit in limits},
        "fits": plan.fits,
        "remedies": list(remedies),
    }


def _row(program: ProgramPlan) -> str:
    cost, line = program.cost, program.roofline
    if cost is None or line is None:
        return f"| {program.phase} | {program.runs} | | | {program.total / GIB:.2f} | | | | | refused by the compiler |"
    return (
        f"| {program.phase} | {program.runs} | {cost.arguments / GIB:.2f} | {cost.temporaries / GIB:.2f} "
        f"| {program.total / GIB:.2f} | {cost.flops / 1e12:.3g} | {cost.memory_traffic / 1e9:.3g} "
        f"| {cost.sent / 1e9:.3g} | {program.seconds:.3g} | {line.bound} |"
    )


def _decoding(step: DecodeStep) -> str:
    return (
        f"a decode step of {step.tokens} tokens moves {step.bytes / 1e9:.3g} GB a chip; weights and caches once are "
        f"{step.least_bytes / 1e9:.3g} GB, {step.least_bytes / step.bytes:.0%} of it. A token takes "
        f"{step.flops / 1e9:.3g} GFLOP; two for each of its weights are {step.least_flops / 1e9:.3g}"
    )


def _program_json(program: ProgramPlan) -> dict[str, Any]:
    told: dict[str, Any] = {"phase": program.phase, "runs": program.runs, "total": program.total}
    cost, line = program.cost, program.roofline
    if cost is None or line is None:
        return {**told, "refused": True}
    return {
        **told,
        "refused": False,
        "arguments": cost.arguments,
        "outputs": cost.outputs,
        "aliased": cost.aliased,
        "temporaries": cost.temporaries,
        "code": cost.code,
        "flops": cost.flops,
        "memory_traffic": cost.memory_traffic,
        "collectives": dict(cost.collectives),
        "seconds": program.seconds,
        "bound": line.bound,
        **({"decode_step": asdict(program.decoding)} if program.decoding else {}),
        "largest_buffers": [
            {"dims": list(x.dims), "dtype": x.dtype, "bytes": x.bytes, "made_by": x.op_name}
            for x in cost.buffers[:_BUFFERS_TOLD]
        ],
    }


def _largest(plan: RunPlan, limit: Limit) -> str:
    """Rounded down to what can be set: a batch shares out whole prompts, which tensor parallelism shares."""
    if math.isinf(limit.largest):
        return "any number"
    pieces = plan.mesh["tensor"] if limit.key == "per_device_batch_size" else 1
    return f"{math.floor(limit.largest * pieces) / pieces:g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
