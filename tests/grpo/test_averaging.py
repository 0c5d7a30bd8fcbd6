import numpy as np
import pytest

from audio_grpo.grpo import mask_truncated, token_weights

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")
MASK = np.asarray([[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [0, 0, 0, 0]]], bool)


@pytest.mark.parametrize(
    ("loss_types", "per_token"),
    [
        # Four sequences of 2, 4, 1 and no tokens.
        (("grpo", "sapo"), [[1 / 8, 1 / 16], [1 / 4, 0]]),
        # Seven tokens.
        (("bnpo", "dapo", "cispo"), [[1 / 7, 1 / 7], [1 / 7, 0]]),
        # Four sequences that could have had four tokens each.
        (("dr_grpo",), [[1 / 16, 1 / 16], [1 / 16, 0]]),
    ],
)
def test_token_weights_worked_by_hand(loss_types, per_token):
    for loss_type in loss_types:
        weights = token_weights(MASK, loss_type)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, np.asarray(per_token)[..., None] * MASK, rtol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_without_tokens_has_weights_of_zero(loss_type):
    assert (token_weights(np.zeros((2, 2, 3), bool), loss_type) == 0).all()


def test_completions_that_were_cut_off_lose_all_their_tokens():
    masked = mask_truncated(MASK, [["stop", "length"], ["length", "stop"]])
    np.testing.assert_array_equal(masked, [MASK[0] * [[1], [0]], np.zeros((2, 4))])
