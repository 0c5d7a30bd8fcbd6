"""From hidden states to tokens and their log-probabilities."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from audio_grpo.parallel.activations import Placement
from audio_grpo.rollout.filters import keep_likely, penalize
from audio_grpo.rollout.inverse_cdf import Masses, add_up, pick
from audio_grpo.rollout.vocabulary import Vocabulary, cut_vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn."""

    greedy: bool = False
    """Take the likeliest token, the first one if there are several; top-k, top-p and min-p change nothing then."""
    temperature: float = 1.0
    """Divides the logits; also in reported log-probabilities."""
    top_k: int = 0
    """Draw from the k likeliest tokens (ties with the k-th included); 0 draws from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that together have this probability (ties included)."""
    min_p: float = 0.0
    """Draw from the tokens that have at least this share of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that a sequence already has, if positive, and multiplies them if negative."""
    min_length: int = 0
    """Completions have at least so many tokens before a stop token."""

    @property
    def by_blocks(self) -> bool:
        """Whether a draw needs to see only one block of the vocabulary at a time."""
        filters = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return self.repetition_penalty == 1 and (self.greedy or not filters)


class Drawn(NamedTuple):
    """A token for each slot.

    `log_probs - log_kept` is its log-probability in the distribution that it was drawn from; a learner that scores the
    full distribution can correct for the difference with it.
    """

    tokens: Int[Array, "S"]
    log_probs: Float[Array, "S"]
    """Of the *tempered full* distribution, before any token is ruled out or penalised: the learner computes the same
    quantity from the same hidden states."""
    log_kept: Float[Array, "S"]
    """Log of the probability that all tokens not ruled out have together; with a repetition penalty, which changes
    single tokens, what makes the sentence above true."""


def drawable(
    sampling: Sampling, allowed: Bool[Array, "V"], stop: tuple[int, ...], length: Int[Array, "S"]
) -> Bool[Array, "#S V"]:
    """Tokens that rows which have `length` tokens may draw: all that are allowed, but none of `stop` too early."""
    if not sampling.min_length:
        return allowed[None]
    early = allowed.at[jnp.asarray(stop, jnp.int32)].set(False)
    return jnp.where(length[:, None] < sampling.min_length, early, allowed)


def draw(
    sampling: Sampling,
    hidden: Float[Array, "S D"],
    head: Float[Array, "V D"],
    allowed: Bool[Array, "#S V"],
    uniform: Float[Array, "S 2"],
    place: Placement,
    *,
    seen: Bool[Array, "S V"] | None = None,
) -> Drawn:
    """Draw a token of each row's softmax(head · hidden / temperature) out of those allowed, which must be some.

    `uniform` is one number of [0, 1) for each row, in two digits: the first finds the block of the vocabulary, the
    second the token in it. `seen` is asked for by a repetition penalty. Logits of one block of the vocabulary are held
    at a time, unless `sampling.by_blocks` is false: then those of all of it are, several times.
    """
    if seen is None and sampling.repetition_penalty != 1:
        raise ValueError("a repetition penalty needs the tokens that each row has: give draw() `seen`")
    vocabulary = cut_vocabulary(head, place)
    mask = vocabulary.cut(allowed.T)
    if sampling.by_blocks:
        return _draw_by_blocks(sampling, vocabulary, hidden, mask, uniform)
    return _draw_at_once(sampling, vocabulary, hidden, mask, uniform, None if seen is None else vocabulary.cut(seen.T))


def _draw_by_blocks(
    sampling: Sampling,
    vocabulary: Vocabulary,
    hidden: Float[Array, "S D"],
    allowed: Bool[Array, "T b G M #S"],
    uniform: Float[Array, "S 2"],
) -> Drawn:
    """Logits serve once, for sums; those of the few tokens that a row ends up among are made again."""

    def add_up_tempered(logits: Float[Array, "T k G M S"], allowed: Bool[Array, "T k G M #S"]) -> Masses:
        return add_up(logits / sampling.temperature, allowed, greedy=sampling.greedy)

    def members(block: Int[Array, "T S"], group: Int[Array, "T S"]) -> Float[Array, "T M S"]:
        logits = vocabulary.group_logits(hidden, block, group) / sampling.temperature
        return jnp.where(vocabulary.group(allowed, block, group), logits, -jnp.inf)

    masses = vocabulary.summarize(hidden, allowed, add_up_tempered)
    tokens, logits = pick(vocabulary, masses, members, uniform, greedy=sampling.greedy)
    kept = jax.nn.logsumexp(masses.allowed, axis=(0, 1))
    total = jnp.logaddexp(kept, jax.nn.logsumexp(masses.barred, axis=(0, 1)))
    # Made again, a logit near the total may come out above it.
    return Drawn(tokens, jnp.minimum(logits - total, 0.0), kept - total)


def _draw_at_once(
    sampling: Sampling,
    vocabulary: Vocabulary,
    hidden: Float[Array, "S D"],
    allowed: Bool[Array, "T b G M #S"],
    uniform: Float[Array, "S 2"],
    seen: Bool[Array, "T b G M S"] | None,
) -> Drawn:
    tempered = vocabulary.logits(hidden) / sampling.temperature
    logits = tempered if seen is None else penalize(tempered, seen, sampling.repetition_penalty)
    filters = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
    kept = allowed if sampling.greedy else keep_likely(logits, allowed, **filters)
    masses = add_up(logits, kept, greedy=sampling.greedy)
    candidates = jnp.where(kept, logits, -jnp.inf)
    tokens, chosen = pick(vocabulary, masses, partial(vocabulary.group, candidates), uniform, greedy=sampling.greedy)
    unpenalized = jnp.take_along_axis(tempered.reshape(-1, len(tokens)), tokens[None], axis=0)[0]
    log_probs = unpenalized - jax.nn.logsumexp(tempered, axis=(0, 1, 2, 3))
    log_drawn = chosen - jax.nn.logsumexp(masses.allowed, axis=(0, 1))
    return Drawn(tokens, log_probs, log_probs - log_drawn)
