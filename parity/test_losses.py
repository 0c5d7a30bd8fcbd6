"""Losses, their gradients, advantages and metrics, against TRL's own trainer on the same numbers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trl.rewards import get_soft_overlong_punishment

from audio_grpo.config import Config
from audio_grpo.grpo import (
    TokenScores,
    advantage_settings,
    compute_advantages,
    grpo_loss_fn,
    loss_settings,
    mask_truncated,
    token_weights,
)
from audio_grpo.rewards.overlong import soft_overlong_punishment
from audio_grpo.types import FinishReason, GroupBatch, PromptBatch
from parity.conftest import Agree
from parity.trl_trainer import Numbers, Step, grpo, rloo_advantages

TOLERANCE = 1e-5
PROMPTS, GENERATIONS, LENGTH = 3, 4, 6
OTHER_NAMES = {"grpo_epsilon": "epsilon", "grpo_beta": "beta"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {"epsilon_high": 0.28},
    "dapo": {"epsilon_high": 0.28, "delta": 1.5},
    "dr_grpo": {"delta": 1.3},
    "cispo": {"epsilon_high": 1.2},
    "sapo": {"sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.5},
}
# Names of ours; bounds are narrow, so that they hold something back.
CHOICES: list[list[dict[str, Any]]] = [
    [{}, {"num_iterations": 2}],
    [
        {"grpo_beta": 0.0},
        {"grpo_beta": 0.5, "kl_estimator": "k3", "use_bias_correction_kl": False},
        {"grpo_beta": 0.5, "kl_estimator": "k3", "use_bias_correction_kl": True},
    ],
    [
        {},
        *(
            {"importance_sampling_correction": True, "importance_sampling_mode": mode, **bounds}
            for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
            for bounds in (
                {"importance_sampling_clip_max": 1.2},
                {"importance_sampling_clip_min": 0.8, "importance_sampling_clip_max": 1.5},
                {"importance_sampling_clip_min": 0.8, "importance_sampling_clip_max": None},
            )
        ),
    ],
    [{}, {"off_policy_mask_threshold": 0.05}],
    [{}, {"mask_truncated_completions": True}],
    [
        *({"scale_rewards": scale} for scale in ("group", "batch", "none")),
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
    [{}, {"reward_weights": [0.5, 2.0]}],
    [{}, {"entropy_coef": 0.2}],
]


def _numbers(seed: int) -> Numbers:
    """Log-probabilities that float32 holds, with ratios on both sides of every bound."""
    rng = np.random.default_rng(seed)
    shape = (PROMPTS * GENERATIONS, LENGTH)
    policy = rng.uniform(-6, 0, shape)
    near = {
        "policy": policy,
        "old": policy + rng.normal(0, 0.3, shape),
        "reference": policy + rng.normal(0, 1, shape),
        "sampler": policy + rng.normal(0, 0.3, shape),
        "entropy": rng.uniform(0, 3, shape),
    }
    return Numbers(
        lengths=rng.integers(1, LENGTH + 1, shape[0]),
        stopped=rng.random(shape[0]) < 0.7,
        rewards=rng.normal(size=(shape[0], 2)).astype(np.float32).astype(np.float64),
        generations=GENERATIONS,
        **{name: values.astype(np.float32).astype(np.float64) for name, values in near.items()},
    )


def _combinations(seed: int) -> Iterator[dict[str, Any]]:
    """Every choice's every alternative with all others at their first, and then chance combinations of all."""
    first: dict[str, Any] = {}
    for alternatives in CHOICES:
        first |= alternatives[0]
    for alternatives in CHOICES:
        yield from (first | alternative for alternative in alternatives[1:])
    rng = np.random.default_rng(seed)
    for _ in range(24):
        chosen: dict[str, Any] = {}
        for alternatives in CHOICES:
            chosen |= alternatives[rng.integers(len(alternatives))]
        if "multi_objective_aggregation" in chosen:
            chosen.pop("scale_rewards", None)
        yield chosen


def _theirs(numbers: Numbers, options: dict[str, Any]) -> Step:
    named = {_their_name(key): value for key, value in options.items() if key != "kl_estimator"}
    return grpo(numbers, use_vllm="importance_sampling_correction" in options, **named)


def _their_name(key: str) -> str:
    sampling = key.startswith("importance_sampling_") and key != "importance_sampling_level"
    return f"vllm_{key}" if sampling else OTHER_NAMES.get(key, key)


def _ours(numbers: Numbers, options: dict[str, Any]) -> Step:
    config = Config(num_generations=GENERATIONS, **options)
    shape = (PROMPTS, GENERATIONS, LENGTH)
    advantages = compute_advantages(np.asarray(_groups(numbers.rewards.T)), advantage_settings(config)).values
    mask = numbers.mask.reshape(shape)
    if config.mask_truncated_completions:
        reasons: list[FinishReason] = ["stop" if stopped else "length" for stopped in numbers.stopped]
        mask = mask_truncated(mask, [reasons[i : i + GENERATIONS] for i in range(0, len(reasons), GENERATIONS)])
    batch = GroupBatch(
        prompts=PromptBatch(np.zeros((PROMPTS, 1), np.int32), np.ones(PROMPTS, np.int32)),
        completion_tokens=np.zeros(shape, np.int32),
        mask=jnp.asarray(mask),
        advantages=advantages,
        token_weights=token_weights(mask, config.loss_type),
        old_log_probs=_groups(numbers.old) if config.num_iterations > 1 else None,
        reference_log_probs=_groups(numbers.reference) if config.grpo_beta > 0 else None,
        sampler_log_probs=_groups(numbers.sampler),
        entropy_weights=token_weights(mask, "dapo") if config.entropy_coef > 0 else None,
    )
    loss_and_gradient = jax.value_and_grad(
        lambda scores: grpo_loss_fn(scores, batch, loss_settings(config)), has_aux=True
    )
    (loss, aux), gradient = loss_and_gradient(TokenScores(_groups(numbers.policy), _groups(numbers.entropy)))
    gradients = (np.asarray(each).reshape(-1, LENGTH) for each in (gradient.log_probs, gradient.entropy))
    return Step(float(loss), *gradients, advantages.reshape(-1), aux.means())


def _groups(values: np.ndarray) -> jax.Array:
    """[N, C] as [B, G, C] and [R, N] as [R, B, G]."""
    shape = (PROMPTS, GENERATIONS, LENGTH) if values.shape[-1] == LENGTH else (-1, PROMPTS, GENERATIONS)
    return jnp.asarray(values.reshape(shape), jnp.float32)


def _same(agree: Agree, quantity: str, ours: Any, reference: Any, scale: float | None = None) -> None:
    """Within 1e-5 of `scale`, or of the largest value."""
    scale = scale or max(float(np.abs(reference).max()), 1e-3)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE * scale, err_msg=quantity)
    agree(quantity, np.asarray(ours), np.asarray(reference), scale=scale)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_losses_and_gradients_are_the_same(loss_type: str, level: str, agree: Agree) -> None:
    for seed, combination in enumerate(_combinations(len(loss_type))):
        options = {"loss_type": loss_type, "importance_sampling_level": level, **OBJECTIVES[loss_type], **combination}
        numbers = _numbers(seed)
        if "num_iterations" not in options:  # the policy that sampled is the one that learns
            numbers = replace(numbers, old=numbers.policy)
        ours, theirs = _ours(numbers, options), _theirs(numbers, options)
        _same(agree, "advantages", ours.advantages, theirs.advantages)
        _same(agree, f"loss of {loss_type}", ours.loss, theirs.loss, scale=1.0)
        _same(agree, f"gradient of {loss_type}", ours.gradient, theirs.gradient)
        _same(agree, "gradient of the entropy bonus", ours.entropy_gradient, theirs.entropy_gradient)
        if not combination.get("mask_truncated_completions"):  # TRL counts sequences without tokens in some means
            _same_metrics(agree, ours.metrics, theirs.metrics)


def _same_metrics(agree: Agree, ours: dict[str, float], theirs: dict[str, float]) -> None:
    others = ("reward", "frac_reward", "entropy_coef")  # the last is a constant of the configuration here
    of_loss = {name: value for name, value in theirs.items() if not name.startswith(others)}
    assert {"entropy"} <= of_loss.keys() <= ours.keys()
    for name, value in of_loss.items():
        _same(agree, "metrics", ours[name], value)


def test_leave_one_out_advantages_are_those_of_rloo(agree: Agree) -> None:
    for seed in range(5):
        numbers = _numbers(seed)
        config = Config(num_generations=GENERATIONS, use_leave_one_out_baseline=True, scale_rewards="none")
        ours = compute_advantages(np.asarray(_groups(numbers.rewards.T)), advantage_settings(config)).values
        _same(agree, "advantages, leave-one-out", ours.reshape(-1), rloo_advantages(numbers))


@pytest.mark.parametrize("cache", [0, 1, 7, 20])
def test_overlong_completions_are_punished_alike(cache: int, agree: Agree) -> None:
    lengths = range(1, 31)
    theirs = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=cache)(
        completion_ids=[[0] * length for length in lengths]
    )
    ours = [soft_overlong_punishment(length, 20, cache) for length in lengths]
    _same(agree, "soft overlong punishment", ours, theirs)
