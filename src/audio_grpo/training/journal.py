"""What a phase writes and says while it goes, in the first of its processes."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from audio_grpo.config import Config
from audio_grpo.training.progress import Progress
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.telemetry import CompletionsWriter, MetricsWriter, Phase, SampledCompletion


class Journal(ExitStack):
    """Metrics, sampled completions and progress; use it in a `with`."""

    def __init__(self, run: RunFolder, phase: Phase, config: Config, *, done: int) -> None:
        """Takes the files back to the first `done` steps."""
        super().__init__()
        self._metrics = self.enter_context(
            MetricsWriter(run, phase, resume_step=done, tensorboard=config.enable_tensorboard)
        )
        # Supervised steps sample nothing, and leave what GRPO has sampled as it is.
        self._completions = CompletionsWriter(run, resume_step=done) if phase == "grpo" else None
        self._progress = self.enter_context(Progress(phase, config.steps, done=done))

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        completions: Sequence[tuple[SampledCompletion, np.ndarray | None]],
    ) -> None:
        """Notes a step; each completion comes with its clip's samples at 16 kHz, where they are known."""
        self._metrics.write(step, metrics)
        if self._completions:
            for completion, samples in completions:
                self._completions.write(completion, samples)
        self._progress.update(step, metrics)
