"""Scaling curves side by side as one SVG picture."""

from typing import Any
from xml.etree import ElementTree

from page import SWEPT

_PANEL, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 290, 240, 62, 16, 44, 40


def scaling_chart(results: dict[str, list[dict[str, Any]]]) -> str:
    """The picture's SVG text: tokens a second over each size that was changed; sizes are evenly spaced."""
    top = max(case["tokens_per_second"] for cases in results.values() for case in cases)
    svg = ElementTree.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_PANEL * len(results)} {_HEIGHT}",
        style="font: 13px sans-serif; background: white",
    )
    for number, (name, cases) in enumerate(results.items()):
        panel = ElementTree.SubElement(svg, "g", transform=f"translate({number * _PANEL} 0)")
        points = [(f"{case['work'][name]:g}", case["tokens_per_second"]) for case in cases]
        _panel(panel, f"Tokens/s over {SWEPT[name]}", points, 1.1 * top)
    return ElementTree.tostring(svg, encoding="unicode")


def _panel(panel: ElementTree.Element, title: str, points: list[tuple[str, float]], top: float) -> None:
    bottom, wide = _HEIGHT - _BOTTOM, _PANEL - _LEFT - _RIGHT
    _text(panel, _LEFT, 22, title, "start")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - share * (bottom - _TOP)
        line = {"x1": str(_LEFT), "x2": str(_PANEL - _RIGHT), "y1": f"{y:.1f}", "y2": f"{y:.1f}", "stroke": "#ddd"}
        ElementTree.SubElement(panel, "line", line)
        _text(panel, _LEFT - 6, y + 4, f"{share * top:,.0f}", "end")
    places = [
        (_LEFT + (i + 0.5) / len(points) * wide, bottom - value / top * (bottom - _TOP))
        for i, (_, value) in enumerate(points)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    ElementTree.SubElement(
        panel, "polyline", {"points": path, "fill": "none", "stroke": "#4c72b0", "stroke-width": "2"}
    )
    for (x, y), (label, value) in zip(places, points, strict=True):
        ElementTree.SubElement(panel, "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3.5", fill="#4c72b0")
        _text(panel, x, y - 8, f"{value:,.0f}", "middle")
        _text(panel, x, bottom + 18, label, "middle")


def _text(panel: ElementTree.Element, x: float, y: float, text: str, anchor: str) -> None:
    ElementTree.SubElement(panel, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}).text = text
