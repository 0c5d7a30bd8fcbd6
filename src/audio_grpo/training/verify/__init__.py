"""The checklist: a configuration tried out on this machine, line by line, with what was measured."""

from audio_grpo.training.verify.check import Check
from audio_grpo.training.verify.checklist import verify_run

__all__ = ["Check", "verify_run"]
