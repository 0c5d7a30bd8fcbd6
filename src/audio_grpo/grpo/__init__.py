"""Group-relative policy optimisation."""

from audio_grpo.grpo.advantages import Advantages, group_advantages
from audio_grpo.grpo.completions import Rollout, generate_offline_completions
from audio_grpo.grpo.learner import Learner, TrainState, init_train_state
from audio_grpo.grpo.log_probs import TokenScores, compute_log_probs
from audio_grpo.grpo.loss import LossAux, LossSettings, grpo_loss_fn, loss_settings, token_weights

__all__ = [
    "Advantages",
    "Learner",
    "LossAux",
    "LossSettings",
    "Rollout",
    "TokenScores",
    "TrainState",
    "compute_log_probs",
    "generate_offline_completions",
    "group_advantages",
    "grpo_loss_fn",
    "init_train_state",
    "loss_settings",
    "token_weights",
]
