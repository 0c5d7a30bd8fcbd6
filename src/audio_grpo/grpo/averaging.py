"""Which tokens count in the loss, and how much."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32

from audio_grpo.config.schema import LossType
from audio_grpo.types import FinishReason


def token_weights(mask: Bool[np.ndarray, "B G C"], loss_type: LossType) -> Float32[np.ndarray, "B G C"]:
    """Weight of each token in the loss of the *whole* accumulated batch, whichever parts it is computed in.

    grpo, sapo: mean over a sequence's tokens, then over sequences. dapo, bnpo, cispo: mean over all tokens (arXiv
    2503.14476). dr_grpo: sum over tokens divided by sequences × C (2503.20783).
    """
    sequences, length = mask.shape[0] * mask.shape[1], mask.shape[2]
    if loss_type in ("grpo", "sapo"):
        return (mask / np.maximum(mask.sum(axis=2, keepdims=True), 1) / sequences).astype(np.float32)
    denominator = sequences * length if loss_type == "dr_grpo" else mask.sum()
    return (mask / max(denominator, 1)).astype(np.float32)


def mask_truncated(
    mask: Bool[np.ndarray, "B G C"], finish_reasons: Sequence[Sequence[FinishReason]]
) -> Bool[np.ndarray, "B G C"]:
    """The mask without completions that were cut off at their largest length (DAPO, arXiv 2503.14476)."""
    stopped = np.asarray([[reason == "stop" for reason in group] for group in finish_reasons])
    return mask & stopped[..., None]
