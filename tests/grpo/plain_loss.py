"""The loss and its metrics by loops over Python floats, a sequence at a time, and batches to try them on."""

import math
from statistics import fmean

import jax.numpy as jnp
import numpy as np

from audio_grpo.grpo import TokenScores, token_weights
from audio_grpo.types import GroupBatch, PromptBatch


def batch_of(mask, advantages, weights, **log_probs):
    prompts = PromptBatch(np.zeros((len(mask), 1), np.int32), np.ones(len(mask), np.int32))
    return GroupBatch(
        prompts=prompts,
        completion_tokens=jnp.zeros(mask.shape, jnp.int32),
        mask=jnp.asarray(mask),
        advantages=jnp.asarray(advantages, jnp.float32),
        token_weights=jnp.asarray(weights, jnp.float32),
        **{name: jnp.asarray(values, jnp.float32) for name, values in log_probs.items()},
    )


def scores_of(log_probs, entropy=None):
    entropy = np.zeros_like(log_probs) if entropy is None else entropy
    return TokenScores(jnp.asarray(log_probs, jnp.float32), jnp.asarray(entropy, jnp.float32))


def random_case(
    seed, old=True, reference=True, sampler=True, loss_type="grpo", groups=2, bonus=False, transcripts=None
):
    """Completions of 0 to 5 tokens whose ratios lie on both sides of every bound.

    With `bonus`, entropy has its weights. With `transcripts` the last of each group is one: "injected" it is in the
    policy's term too, "apart" it is not.
    """
    rng = np.random.default_rng(seed)
    shape = (groups, 3, 5)
    policy = rng.uniform(-6, 0, shape)
    mask = np.arange(5) < rng.integers(0, 6, shape[:2])[..., None]
    near = {
        "old_log_probs": policy + rng.normal(0, 0.3, shape) if old else None,
        "reference_log_probs": policy + rng.normal(0, 1, shape) if reference else None,
        "sampler_log_probs": policy + rng.normal(0, 0.3, shape) if sampler else None,
    }
    log_probs = {name: values for name, values in near.items() if values is not None}
    given = mask & (np.arange(3) == 2)[:, None] if transcripts else np.zeros_like(mask)
    counted = mask & ~given if transcripts == "apart" else mask
    further = {"entropy_weights": token_weights(counted & ~given, "dapo")} if bonus else {}
    further |= {"transcript_weights": token_weights(given, "dapo")} if transcripts else {}
    weights = token_weights(counted, loss_type)
    batch = batch_of(counted, rng.normal(size=shape[:2]), weights, **log_probs, **further)
    return policy, rng.uniform(0, 3, shape), batch


def plain_report(policy, entropy, batch, settings, fixed=None):
    """The loss and its metrics; `fixed` is the policy wherever the loss takes it without gradient."""
    fixed = policy if fixed is None else fixed
    values = {name: [] for name in ("entropy", "kl", "gap", "dropped", "masked", "ratio", "weight", "low", "high")}
    values["cross_entropy"] = []
    per_sequence = {"low": [], "high": []}
    loss = 0.0
    for at in np.ndindex(batch.mask.shape[:2]):
        tokens = np.flatnonzero(batch.mask[at])
        if len(tokens) == 0:
            continue
        sequence = _Sequence(policy, fixed, batch, settings, at, tokens)
        loss += sum(float(batch.token_weights[at][t]) * sequence.token_loss(t) for t in tokens)
        if sequence.given:
            continue
        units = tokens if settings.importance_sampling_level == "token" else tokens[:1]
        for name, clipped in (("low", sequence.low), ("high", sequence.high)):
            values[name] += [clipped(t) for t in units]
            per_sequence[name].append(fmean(clipped(t) for t in units))
        values["ratio"] += [sequence.ratio(t) for t in units]
        whole = settings.correction is not None and settings.correction.level == "sequence"
        values["weight"] += [sequence.weight(t) for t in (tokens[:1] if whole else tokens)]
        values["entropy"] += [entropy[at][t] for t in tokens]
        values["gap"] += [abs(sequence.old(t) - sequence.sampler(t)) for t in tokens]
        values["kl"] += [sequence.kl(t) for t in tokens]
        values["dropped"].append(sequence.dropped())
    if batch.transcript_weights is not None:
        values["cross_entropy"] = (-policy[np.asarray(batch.transcript_weights) > 0]).tolist()
    metrics = _metrics(values, per_sequence, batch, settings)
    if batch.entropy_weights is None and batch.transcript_weights is None:
        return loss, metrics
    bonus = 0 if batch.entropy_weights is None else settings.entropy_coef * metrics["entropy"]
    cross_entropy = metrics.get("transcript/cross_entropy", 0)
    return loss - bonus + settings.sft_coef * cross_entropy, {**metrics, "policy_loss": loss}


def _metrics(values, per_sequence, batch, settings):
    def mean(name):
        return fmean(values[name]) if values[name] else 0.0

    metrics = {
        "entropy": mean("entropy"),
        "policy_ratio/mean": mean("ratio"),
        "sampling/sampling_logp_difference/mean": mean("gap"),
        "sampling/sampling_logp_difference/max": max(values["gap"], default=0),
        "sampling/importance_sampling_ratio/min": min(values["weight"], default=0),
        "sampling/importance_sampling_ratio/mean": mean("weight"),
        "sampling/importance_sampling_ratio/max": max(values["weight"], default=0),
    }
    if batch.transcript_weights is not None:
        metrics["transcript/cross_entropy"] = mean("cross_entropy")
    if batch.reference_log_probs is not None:
        metrics["kl"] = mean("kl")
    if settings.off_policy_mask_threshold is not None:
        metrics["sampling/off_policy_fraction"] = mean("dropped")
    if settings.correction is not None:
        metrics["sampling/masked_fraction"] = fmean([w == 0 for w in values["weight"]] or [0])
    if settings.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean("high")
    elif settings.loss_type != "sapo":
        metrics |= {
            "clip_ratio/low_mean": mean("low"),
            "clip_ratio/low_min": min(per_sequence["low"], default=0),
            "clip_ratio/high_mean": mean("high"),
            "clip_ratio/high_max": max(per_sequence["high"], default=0),
            "clip_ratio/region_mean": mean("low") + mean("high"),
        }
    return metrics


class _Sequence:
    def __init__(self, policy, fixed, batch, settings, at, tokens):
        self.policy, self.fixed, self.tokens, self.settings = policy[at], fixed[at], tokens, settings
        self.advantage = float(batch.advantages[at])
        self.given = batch.transcript_weights is not None and bool((batch.transcript_weights[at] > 0).any())
        names = ("old_log_probs", "reference_log_probs", "sampler_log_probs")
        given = [None if getattr(batch, name) is None else np.float64(getattr(batch, name)[at]) for name in names]
        self._old, self._reference, self._sampler = given

    def old(self, t):
        return self.fixed[t] if self._old is None else self._old[t]

    def sampler(self, t):
        return self.old(t) if self._sampler is None or self.given else self._sampler[t]

    def ratio(self, t, policy=None):
        policy = self.policy if policy is None else policy
        among = [t] if self.settings.importance_sampling_level == "token" else self.tokens
        return _exp(fmean(policy[i] - self.old(i) for i in among))

    def upper(self):
        s = self.settings
        return s.epsilon if s.epsilon_high is None else s.epsilon_high

    def low(self, t):
        return self.advantage < 0 and self.ratio(t) < 1 - self.settings.epsilon

    def high(self, t):
        cispo = self.settings.loss_type == "cispo"
        return self.advantage > 0 and self.ratio(t) > self.upper() + (0 if cispo else 1)

    def objective(self, t):
        s, ratio, advantage = self.settings, self.ratio(t), self.advantage
        if s.loss_type == "cispo":
            return min(self.ratio(t, self.fixed), self.upper()) * advantage * self.policy[t]
        if s.loss_type == "sapo":
            steepness = s.sapo_temperature_pos if advantage > 0 else s.sapo_temperature_neg
            return 4 / steepness / (1 + math.exp(-steepness * (ratio - 1))) * advantage
        capped = ratio if s.delta is None else min(ratio, s.delta)
        return min(capped * advantage, min(max(ratio, 1 - s.epsilon), 1 + self.upper()) * advantage)

    def weight(self, t):
        correction = self.settings.correction
        if correction is None:
            return _exp(self.old(t) - self.sampler(t))
        whole = correction.mode.startswith("sequence")
        ratio = _exp(sum(self.old(i) - self.sampler(i) for i in (self.tokens if whole else [t])))
        least = -math.inf if correction.clip_min is None else correction.clip_min
        most = math.inf if correction.clip_max is None else correction.clip_max
        if correction.mode.endswith("truncate"):
            return min(max(ratio, least), most)
        return ratio if least <= ratio <= most else 0.0

    def dropped(self):
        threshold = self.settings.off_policy_mask_threshold
        drift = fmean(self.sampler(t) - self.fixed[t] for t in self.tokens)
        return threshold is not None and self.advantage < 0 and drift > threshold

    def kl(self, t):
        if self._reference is None or self.given:
            return 0.0
        d = self._reference[t] - self.policy[t]
        bounded = min(20, max(-20, d))
        estimates = {"k1": -d, "k2": d * d / 2, "k3": math.exp(bounded) - bounded - 1}
        return estimates[self.settings.kl_estimator] * (self.ratio(t) if self.settings.use_bias_correction_kl else 1)

    def token_loss(self, t):
        weight = 1 if self.settings.correction is None else self.weight(t)
        objective = 0 if self.dropped() else weight * self.objective(t)
        return self.settings.beta * self.kl(t) - objective


def _exp(x):
    return math.exp(min(20, max(-20, x)))
