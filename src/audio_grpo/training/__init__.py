"""Runs: GRPO and supervised loops, evaluation, checkpoints, telemetry."""

from audio_grpo.training.evaluate import Evaluator, evaluate_run
from audio_grpo.training.grpo_loop import setup_train_loop, train_loop
from audio_grpo.training.loop import Trainer
from audio_grpo.training.sampling import generate_completions
from audio_grpo.training.sft_loop import sft_loop

__all__ = ["Evaluator", "Trainer", "evaluate_run", "generate_completions", "setup_train_loop", "sft_loop", "train_loop"]
