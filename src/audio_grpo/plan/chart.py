"""A plan as one SVG picture: memory by program against the chip's, and a step's least time by program."""

import math
from xml.etree import ElementTree

from audio_grpo.plan.run_plan import ProgramPlan, RunPlan
from audio_grpo.training.memory import GIB

_WIDTH, _LEFT, _ROW, _BAR, _TOP = 860, 120, 30, 20, 84
_PARTS = (
    ("weights", "#4c72b0"),
    ("optimizer", "#8172b3"),
    ("reference", "#64b5cd"),
    ("cache and inputs", "#ccb974"),
    ("temporaries and results", "#c44e52"),
)
_SPACE = _WIDTH - _LEFT - 150


def plan_chart(plan: RunPlan) -> str:
    """The picture's SVG text."""
    rows = len(plan.programs)
    height = _TOP + 2 * rows * _ROW + 110
    svg = ElementTree.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {height}",
        style="font: 13px sans-serif; background: white",
    )
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    _text(svg, 12, 24, f"{plan.model_name} on {plan.topology} ({mesh}): GiB of each chip", bold=True)
    _legend(svg)
    _memory(svg, plan)
    top = _TOP + rows * _ROW + 56
    told = "" if math.isnan(plan.step_seconds) else f": {plan.step_seconds:.2f} s"
    _text(svg, 12, top, f"Least time of a step{told}, by program and what bounds it", bold=True)
    _times(svg, plan, top + 16)
    return ElementTree.tostring(svg, encoding="unicode")


def _memory(svg: ElementTree.Element, plan: RunPlan) -> None:
    scale = _SPACE / max(plan.chip.memory, plan.peak.total)
    for row, program in enumerate(plan.programs):
        y = _TOP + row * _ROW
        _text(svg, 12, y + 15, program.phase)
        x = float(_LEFT)
        for (name, color), size in zip(_PARTS, _shares(plan, program), strict=True):
            _bar(svg, x, y, size * scale, color, f"{name}: {size / GIB:.2f} GiB")
            x += size * scale
        _text(svg, x + 6, y + 15, f"{program.total / GIB:.1f}")
    limit = _LEFT + plan.chip.memory * scale
    bottom = _TOP + len(plan.programs) * _ROW
    ElementTree.SubElement(
        svg, "line", x1=f"{limit:.1f}", x2=f"{limit:.1f}", y1=str(_TOP - 8), y2=str(bottom), stroke="#333"
    ).set("stroke-dasharray", "4 3")
    _text(svg, limit + 5, bottom + 8, f"{plan.chip.memory / GIB:.1f} of {plan.chip.name}")


def _shares(plan: RunPlan, program: ProgramPlan) -> tuple[float, ...]:
    kept = [plan.kept[name] if program.held else 0 for name in ("weights", "optimizer", "reference")]
    return (*kept, max(0, program.held - sum(kept)), program.made)


def _times(svg: ElementTree.Element, plan: RunPlan, top: float) -> None:
    known = [program.seconds for program in plan.programs if not math.isnan(program.seconds)]
    for row, program in enumerate(plan.programs):
        y = top + row * _ROW
        _text(svg, 12, y + 15, program.phase)
        if program.roofline is None:
            _text(svg, _LEFT, y + 15, "refused by the compiler for its size")
            continue
        width = program.seconds / max(known) * _SPACE
        told = f"{program.seconds:.3g} s, {program.roofline.bound}"
        _bar(svg, _LEFT, y, width, "#55a868", told)
        _text(svg, _LEFT + width + 6, y + 15, told)


def _legend(svg: ElementTree.Element) -> None:
    x = float(_LEFT)
    for name, color in _PARTS:
        _bar(svg, x, 42, 12, color, name, height=12)
        _text(svg, x + 17, 53, name)
        x += 40 + 7 * len(name)


def _bar(svg: ElementTree.Element, x: float, y: float, width: float, color: str, told: str, height: int = _BAR) -> None:
    bar = ElementTree.SubElement(
        svg, "rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=str(height), fill=color
    )
    ElementTree.SubElement(bar, "title").text = told


def _text(svg: ElementTree.Element, x: float, y: float, text: str, *, bold: bool = False) -> None:
    attributes = {"font-weight": "bold"} if bold else {}
    ElementTree.SubElement(svg, "text", attributes, x=f"{x:.1f}", y=f"{y:.1f}").text = text
