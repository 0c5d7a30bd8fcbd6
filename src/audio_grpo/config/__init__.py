"""What a run is to do: schema, files, presets and overrides."""

from audio_grpo.config.loading import initialize, load_config, to_yaml
from audio_grpo.config.schema import Config, DecoderBlock, NormalizerName, Template

__all__ = ["Config", "DecoderBlock", "NormalizerName", "Template", "initialize", "load_config", "to_yaml"]
