"""Published checkpoints, in and out: folders of safetensors and a config.json that other software reads too."""

from audio_grpo.model.checkpoint.config_file import PublishedModel, spec_from_published
from audio_grpo.model.checkpoint.config_json import published_config
from audio_grpo.model.checkpoint.creating import create_published, published_table
from audio_grpo.model.checkpoint.reading import read_published
from audio_grpo.model.checkpoint.vision import PUBLISHED_VISION, VisionSpec, vision_table
from audio_grpo.model.checkpoint.writing import write_published

__all__ = [
    "PUBLISHED_VISION",
    "PublishedModel",
    "VisionSpec",
    "create_published",
    "published_config",
    "published_table",
    "read_published",
    "spec_from_published",
    "vision_table",
    "write_published",
]
