"""The HTML report of a run."""

from audio_grpo.report.page import build_report

__all__ = ["build_report"]
