"""The engine's compiled programs: prefill of prompts, admission of completions, a burst of decode steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from audio_grpo.model.attention import Membership, Segment
from audio_grpo.model.decoder import KeysValues
from audio_grpo.model.spec import ThinkerSpec, compute_dtype
from audio_grpo.model.table import Weights
from audio_grpo.model.thinker import extend, output_head, prefill
from audio_grpo.parallel.activations import FEW_TOKENS, Placement
from audio_grpo.rollout.sampler import Sampling, sample
from audio_grpo.types import PromptBatch


class Prompts(NamedTuple):
    """The prompt cache: R rows that completions share."""

    cache: KeysValues
    """[L, R, T, K, N]."""
    length: Int[Array, "R"]
    hidden: Float[Array, "R D"]
    """Final hidden state of each prompt's last token: the first token of every completion is drawn from it."""


class Slots(NamedTuple):
    """S completions that decode together."""

    cache: KeysValues
    """Keys and values of the completions' own tokens, [L, S, C, K, N]."""
    hidden: Float[Array, "S D"]
    """Final hidden state from which the next token is drawn."""
    row: Int[Array, "S"]
    key: Key[Array, "S"]
    length: Int[Array, "S"]
    """Tokens drawn so far."""
    limit: Int[Array, "S"]
    """Tokens that may be drawn."""
    active: Bool[Array, "S"]
    tokens: Int[Array, "S C"]
    log_probs: Float[Array, "S C"]


class DecodeState(NamedTuple):
    """All that decoding keeps on the device."""

    prompts: Prompts
    slots: Slots


class Admission(NamedTuple):
    """Completions that begin, one for each slot; entries of `slot` beyond S are ignored."""

    slot: Int[Array, "S"]
    row: Int[Array, "S"]
    key: Key[Array, "S"]
    limit: Int[Array, "S"]


def empty_state(spec: ThinkerSpec, *, rows: int, slots: int, prompt_length: int, completion_length: int) -> DecodeState:
    """A state in which nothing decodes."""
    decoder, dtype = spec.decoder, compute_dtype(spec)

    def cache(sequences: int, length: int) -> KeysValues:
        shape = (decoder.layers, sequences, length, decoder.kv_heads, decoder.head_width)
        return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    integers = jnp.zeros(slots, jnp.int32)
    return DecodeState(
        Prompts(cache(rows, prompt_length), jnp.zeros(rows, jnp.int32), jnp.zeros((rows, decoder.width), dtype)),
        Slots(
            cache=cache(slots, completion_length),
            hidden=jnp.zeros((slots, decoder.width), dtype),
            row=integers,
            key=jax.random.split(jax.random.key(0), slots),
            length=integers,
            limit=integers,
            active=jnp.zeros(slots, bool),
            tokens=jnp.zeros((slots, completion_length), jnp.int32),
            log_probs=jnp.zeros((slots, completion_length), jnp.float32),
        ),
    )


def prefill_rows(
    spec: ThinkerSpec,
    weights: Weights,
    state: DecodeState,
    prompts: PromptBatch,
    heard: Float[Array, "B A D"],
    rows: Int[Array, "P b"],
    audio_pad: int,
) -> DecodeState:
    """Run prompts into rows of the prompt cache.

    Prompts and rows come in P parts, each on its devices; `rows` counts within a part, and a prompt whose row is beyond
    its part is padding and leaves no trace.
    """
    hidden, cache = prefill(spec, weights, prompts, heard, audio_pad)
    old = state.prompts

    def put(old: Array, new: Array) -> Array:
        old_parts, new_parts = (x.reshape(rows.shape[0], -1, *x.shape[1:]) for x in (old, new))
        put_part = jax.vmap(lambda o, n, r: o.at[r].set(n, mode="drop"))
        return put_part(old_parts, new_parts, rows).reshape(old.shape)

    put_layers = jax.vmap(put)
    return state._replace(
        prompts=Prompts(
            KeysValues(put_layers(old.cache.keys, cache.keys), put_layers(old.cache.values, cache.values)),
            put(old.length, prompts.true_length),
            put(old.hidden, hidden),
        )
    )


def admit(state: DecodeState, admission: Admission) -> DecodeState:
    """Begin completions: each slot takes up its prompt's last hidden state."""
    slots, at = state.slots, admission.slot
    return state._replace(
        slots=slots._replace(
            hidden=slots.hidden.at[at].set(state.prompts.hidden[admission.row], mode="drop"),
            row=slots.row.at[at].set(admission.row, mode="drop"),
            key=slots.key.at[at].set(admission.key, mode="drop"),
            length=slots.length.at[at].set(0, mode="drop"),
            limit=slots.limit.at[at].set(admission.limit, mode="drop"),
            active=slots.active.at[at].set(True, mode="drop"),
        )
    )


def decode_burst(
    spec: ThinkerSpec,
    sampling: Sampling,
    stop: tuple[int, ...],
    steps: int,
    weights: Weights,
    allowed: Bool[Array, "V"],
    state: DecodeState,
    membership: Membership,
) -> DecodeState:
    """Draw up to `steps` tokens in every active slot; ends early when none is active."""
    # Once for the burst: within the loop, narrower weights would be widened again for every token.
    weights = {key: value.astype(state.slots.hidden.dtype) for key, value in weights.items()}

    def more(carry: tuple[Int[Array, ""], Slots]) -> Bool[Array, ""]:
        return (carry[0] < steps) & carry[1].active.any()

    def step(carry: tuple[Int[Array, ""], Slots]) -> tuple[Int[Array, ""], Slots]:
        done, slots = carry
        return done + 1, _decode_step(spec, sampling, stop, weights, allowed, state.prompts, membership, slots)

    _, slots = jax.lax.while_loop(more, step, (jnp.int32(0), state.slots))
    return state._replace(slots=slots)


def _decode_step(
    spec: ThinkerSpec,
    sampling: Sampling,
    stop: tuple[int, ...],
    weights: Weights,
    allowed: Bool[Array, "V"],
    prompts: Prompts,
    membership: Membership,
    slots: Slots,
) -> Slots:
    """Draw a token from each slot's hidden state, then run it to the next hidden state."""
    place = Placement(spec.mesh, FEW_TOKENS)
    whole = place(slots.hidden, "batch", None)
    logits = jnp.einsum("sd,vd->sv", whole, output_head(weights), preferred_element_type=jnp.float32)
    logits = place(logits, "batch", "vocab")
    uniform = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)))
    tokens, log_probs = sample(sampling, logits, allowed, uniform(slots.key, slots.length))

    count, capacity = slots.tokens.shape
    each = jnp.arange(count)
    at = jnp.where(slots.active, slots.length, capacity)
    positions = (prompts.length[slots.row] + slots.length)[:, None]
    segments = [
        Segment(*prompts.cache, _earlier(prompts.cache, prompts.length), membership),
        Segment(*slots.cache, _earlier(slots.cache, slots.length)),
    ]
    hidden, new = extend(spec, weights, tokens[:, None], positions, segments)
    length = slots.length + slots.active
    append = jax.vmap(lambda cache, new, at: cache.at[:, at].set(new[:, 0], mode="drop"), (1, 1, 0), 1)
    return slots._replace(
        cache=KeysValues(*(append(old, fresh, at) for old, fresh in zip(slots.cache, new, strict=True))),
        hidden=hidden[:, 0],
        length=length,
        active=slots.active & ~jnp.isin(tokens, jnp.asarray(stop, jnp.int32)) & (length < slots.limit),
        tokens=slots.tokens.at[each, at].set(tokens, mode="drop"),
        log_probs=slots.log_probs.at[each, at].set(log_probs, mode="drop"),
    )


def _earlier(cache: KeysValues, length: Int[Array, "R"]) -> Bool[Array, "R 1 T"]:
    """True for the cached positions below each row's length."""
    return (jnp.arange(cache.keys.shape[2]) < length[:, None])[:, None, :]
