"""Options of the loss that contradict each other are refused, with a sentence that names them."""

import pytest

from audio_grpo.config import initialize
from audio_grpo.errors import UserError
from audio_grpo.grpo import advantage_settings, loss_settings

RECIPE = "grpo_audio_qwen3_omni_test"
OVERLONG = "reward_functions=[asr_wer_reward, soft_overlong_punishment_reward]"
APART = "multi_objective_aggregation=normalize_then_sum"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["loss_type=cispo"], "epsilon_high for the largest ratio itself, which is None"),
        (["loss_type=cispo", "epsilon_high=0.28"], "epsilon_high for the largest ratio itself, which is 0.28"),
        (["loss_type=sapo", "epsilon_high=0.28"], "epsilon_high 0.28 has nothing to clip with loss_type sapo"),
        (["loss_type=cispo", "epsilon_high=5.0", "delta=6.0"], "delta 6.0 has nothing to cap with loss_type cispo"),
        (["loss_type=sapo", "delta=2.0"], "delta 2.0 has nothing to cap with loss_type sapo"),
        (["delta=1.2"], "delta 1.2 is not above 1.2"),
        (["epsilon_high=0.5", "delta=1.4"], "delta 1.4 is not above 1.5"),
        (["importance_sampling_clip_min=3.0"], "importance_sampling_clip_min 3.0 is not below"),
        (["importance_sampling_correction=true", "importance_sampling_clip_max=null"], "both are null"),
        ([APART, "scale_rewards=none"], "scale_rewards none contradicts multi_objective_aggregation"),
        ([APART, "use_leave_one_out_baseline=true"], "use_leave_one_out_baseline has no effect"),
        (["soft_punish_cache=20"], "without soft_overlong_punishment_reward"),
        ([OVERLONG], "with soft_overlong_punishment_reward"),
        ([OVERLONG, "soft_punish_cache=129"], "soft_punish_cache 129 exceeds the 128 tokens"),
    ],
)
def test_contradictions_are_refused(overrides, sentence):
    with pytest.raises(UserError) as caught:
        initialize([RECIPE, *overrides])
    (problem,) = str(caught.value).splitlines()[1:]
    assert sentence in problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss_type=cispo", "epsilon_high=5.0", "importance_sampling_level=sequence"],
        ["loss_type=sapo", "importance_sampling_level=sequence"],
        ["epsilon_high=0.28", "delta=4.0", "loss_type=dapo", "mask_truncated_completions=true"],
        ["grpo_beta=0.0", "kl_estimator=k1"],
        ["importance_sampling_correction=true", "importance_sampling_clip_min=0.5"],
        [OVERLONG, "soft_punish_cache=128"],
        [APART, "reward_weights=[1.0, 0.5]"],
        ["inject_transcript=true", "mask_truncated_completions=true", "use_leave_one_out_baseline=true"],
        ["inject_transcript=true", "sft_coef=0.1", "entropy_coef=0.01", "loss_type=dr_grpo", "grpo_beta=0.0"],
    ],
)
def test_what_goes_together_is_taken(overrides):
    taken, plain = initialize([RECIPE, *overrides]).model_dump(), initialize([RECIPE]).model_dump()
    assert {key for key in plain if taken[key] != plain[key]} == {override.split("=")[0] for override in overrides}


def test_every_option_reaches_the_loss_and_the_advantages():
    plain = initialize([RECIPE])
    assert loss_settings(plain).correction is None
    given = {
        "loss_type": "dapo",
        "epsilon_high": 0.28,
        "delta": 4.0,
        "sapo_temperature_pos": 1.5,
        "sapo_temperature_neg": 2.5,
        "importance_sampling_level": "sequence",
        "kl_estimator": "k1",
        "use_bias_correction_kl": True,
        "off_policy_mask_threshold": 0.5,
        "entropy_coef": 0.01,
        "sft_coef": 0.1,
        "scale_rewards": "batch",
        "use_leave_one_out_baseline": True,
        "reward_weights": [1.0, 0.5],
    }
    correction = {
        "importance_sampling_correction": True,
        "importance_sampling_mode": "token_mask",
        "importance_sampling_clip_min": 0.5,
        "importance_sampling_clip_max": 2.0,
    }
    config = initialize([RECIPE, *(f"{key}={value}" for key, value in (given | correction).items())])
    loss, advantages = loss_settings(config), advantage_settings(config)
    for name, value in given.items():
        assert getattr(loss if hasattr(loss, name) else advantages, name) == value, name
    assert (loss.epsilon, loss.beta) == (config.grpo_epsilon, config.grpo_beta)
    assert loss.correction is not None
    assert (loss.correction.mode, loss.correction.clip_min, loss.correction.clip_max) == ("token_mask", 0.5, 2.0)
    apart = initialize([RECIPE, "multi_objective_aggregation=normalize_then_sum"])
    assert advantage_settings(apart).multi_objective_aggregation == "normalize_then_sum"
