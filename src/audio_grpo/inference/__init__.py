"""Use of checkpoints: transcripts, completions, scores, exports."""

from audio_grpo.inference.export import export, export_adapters
from audio_grpo.inference.generate import generate
from audio_grpo.inference.model import OpenModel, open_checkpoint
from audio_grpo.inference.score import score
from audio_grpo.inference.transcribe import Transcript, transcribe

__all__ = ["OpenModel", "Transcript", "export", "export_adapters", "generate", "open_checkpoint", "score", "transcribe"]
