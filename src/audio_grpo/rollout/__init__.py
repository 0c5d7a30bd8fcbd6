"""Sampling of completions."""

from audio_grpo.rollout.engine import OfflineEngine
from audio_grpo.rollout.sampler import Sampling
from audio_grpo.rollout.settings import EngineSettings, engine_settings
from audio_grpo.types import Completion, InputData, RequestResult

__all__ = [
    "Completion",
    "EngineSettings",
    "InputData",
    "OfflineEngine",
    "RequestResult",
    "Sampling",
    "engine_settings",
]
