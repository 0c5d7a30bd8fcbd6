"""Group-relative policy optimisation."""

from audio_grpo.grpo.advantages import (
    Advantages,
    AdvantageSettings,
    advantage_settings,
    compute_advantages,
    group_advantages,
)
from audio_grpo.grpo.averaging import mask_truncated, token_weights
from audio_grpo.grpo.completions import Rollout, generate_offline_completions
from audio_grpo.grpo.learner import Learner, TrainState, init_train_state
from audio_grpo.grpo.log_probs import TokenScores, compute_log_probs
from audio_grpo.grpo.loss import LossSettings, grpo_loss_fn, loss_settings
from audio_grpo.grpo.metrics import LossAux
from audio_grpo.grpo.ratios import SamplerCorrection

__all__ = [
    "AdvantageSettings",
    "Advantages",
    "Learner",
    "LossAux",
    "LossSettings",
    "Rollout",
    "SamplerCorrection",
    "TokenScores",
    "TrainState",
    "advantage_settings",
    "compute_advantages",
    "compute_log_probs",
    "generate_offline_completions",
    "group_advantages",
    "grpo_loss_fn",
    "init_train_state",
    "loss_settings",
    "mask_truncated",
    "token_weights",
]
