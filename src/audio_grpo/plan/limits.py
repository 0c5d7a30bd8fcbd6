"""How far a plan goes: the largest batch, slot count and clip length that fit, and what to change where it does not."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from audio_grpo.config import Config
from audio_grpo.plan.run_plan import Planner, ProgramPlan, RunPlan
from audio_grpo.plan.topology import parse_topology, topology_names
from audio_grpo.training.memory import GIB

_TOKENS_PER_SECOND = 13


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The largest value of a key with which the run fits, all else as it is, by a line through two compilations."""

    key: str
    now: float
    largest: float


def limits(planner: Planner, config: Config, plan: RunPlan) -> list[Limit]:
    """Largest batch, slot count and clip length, from two more compilations: of gradients and of a decode burst.

    The burst has twice the slots. The gradients are of four times the prompts: memory grows unevenly where rows begin
    to be taken in parts, which more prompts even out.

    Clips weigh by their positions: what another prompt takes in the backward pass, it takes by prompt and completion
    tokens alike, and the tower's and the prefill's arrays grow with the clip.
    """
    batch, slots = config.per_device_batch_size, plan.work.shape.slots
    more_prompts = planner.plan(_changed(config, {"per_device_batch_size": 4 * batch}), phases=["gradients"])
    more_slots = planner.plan(
        _changed(config, {"max_slots": 2 * config.max_slots} | _enough_prompts(config, plan)), phases=["decode burst"]
    )
    for_prompts = _growth(plan, more_prompts) / (3 * batch)
    positions = plan.work.prompt_length + plan.work.learned * plan.work.completion_length
    seconds = config.audio_max_seconds
    for_seconds = {
        "gradients": batch * for_prompts * _TOKENS_PER_SECOND / positions,
        "tower": _program(plan, "tower").made / seconds,
        "prefill": _program(plan, "prefill").made / seconds,
    }
    return [
        _limit(plan, "per_device_batch_size", batch, {"gradients": for_prompts}),
        _limit(
            plan,
            "max_slots",
            slots,
            {"decode burst": _growth(plan, more_slots) / (more_slots.work.shape.slots - slots)},
        ),
        _limit(plan, "audio_max_seconds", seconds, for_seconds),
    ]


def _growth(plan: RunPlan, larger: RunPlan) -> float:
    """Bytes by which the larger plan's only program exceeds the same in `plan`."""
    (program,) = larger.programs
    return program.total - _program(plan, program.phase).total


def _program(plan: RunPlan, phase: str) -> ProgramPlan:
    return next(program for program in plan.programs if program.phase == phase)


def _limit(plan: RunPlan, key: str, now: float, growth: dict[str, float]) -> Limit:
    """`growth` has the bytes that a further unit of the key takes in each phase."""
    room = [
        (plan.chip.memory - _program(plan, phase).total) / bytes_each
        for phase, bytes_each in growth.items()
        if bytes_each > 0
    ]
    return Limit(key=key, now=now, largest=max(0.0, now + min(room, default=math.inf)))


def _changed(config: Config, changes: dict[str, object]) -> Config:
    return Config.model_validate(config.model_dump() | changes)


def _enough_prompts(config: Config, plan: RunPlan) -> dict[str, object]:
    """More slots are taken only where there are as many completions."""
    completions = plan.work.prompts * plan.work.generations
    return {
        "per_device_batch_size": config.per_device_batch_size * max(1, math.ceil(2 * config.max_slots / completions))
    }


def remedies(config: Config, plan: RunPlan) -> Iterator[str]:
    """What to change where a plan does not fit, the most telling first."""
    if plan.fits:
        return
    memory, kept, peak = plan.chip.memory, sum(plan.kept.values()), plan.peak
    yield f"{peak.phase} needs {peak.total / GIB:.1f} GiB a chip of {memory / GIB:.1f}."
    if plan.kept["reference"]:
        less = f"{plan.kept['reference'] / GIB:.1f} GiB less"
        yield f"reference_offload=true keeps the reference in the host's memory: {less}; grpo_beta=0 keeps none."
    if not config.lora_rank:
        yield f"lora_rank=16 trains adapters only: {plan.kept['optimizer'] / GIB:.1f} GiB of optimizer state less."
    if "float32" in (config.mu_dtype, config.nu_dtype):
        yield "mu_dtype=bfloat16 nu_dtype=bfloat16 halves Adam's moments; docs/what_learns.md says what to expect."
    if kept < memory and peak.phase in ("gradients", "scoring"):
        yield "Half the per_device_batch_size with twice the gradient_accumulation_steps halves what a batch takes."
    if kept < memory and peak.phase in ("decode burst", "prefill"):
        yield f"A smaller max_slots shortens the cache of {plan.cache / GIB:.1f} GiB."
    spread = kept * plan.chips / plan.mesh["data"]
    larger = [
        topology
        for topology in map(parse_topology, topology_names())
        if topology.chip == plan.chip and topology.chips > plan.chips and spread / topology.chips < 0.8 * memory
    ]
    if larger:
        yield (
            f"More chips: {larger[0].name} is the smallest slice whose chips hold weights, optimizer state and "
            f"reference with a fifth to spare, shared out by ici_fsdp_parallelism and ici_expert_parallelism."
        )
