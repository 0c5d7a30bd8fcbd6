"""What the engine keeps on the device, and what travels between it and the host.

Slots and rows come in P equal parts, one for each device that holds some: a slot reads rows of its own part only, and
row numbers of slots and queue count within the part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from audio_grpo.model.decoder import KeysValues
from audio_grpo.model.router import route_dtype, routes_width
from audio_grpo.model.spec import ThinkerSpec, compute_dtype
from audio_grpo.types import PromptBatch, Routes


class Prompts(NamedTuple):
    """The prompt cache: R rows that completions share."""

    cache: KeysValues
    """[L, R, K, T, N]."""
    length: Int[Array, "R"]
    hidden: Float[Array, "R D"]
    """Final hidden state of each prompt's last token: the first token of every completion is drawn from it."""
    key: Key[Array, "R"]
    tokens: Int[Array, "R T"]


class Outputs(NamedTuple):
    """What the G completions of each row have come to."""

    tokens: Int[Array, "R G C"]
    log_probs: Float[Array, "R G C"]
    log_kept: Float[Array, "R G C"]
    """Log of the probability that sampling ruled in, of the same distribution."""
    length: Int[Array, "R G"]
    limit: Int[Array, "R G"]
    """Tokens that may be drawn."""
    done: Bool[Array, "R G"]
    routes: Routes | None
    """Of R prompts and their completions, where they are replayed."""


class Slots(NamedTuple):
    """S completions that decode together."""

    cache: KeysValues
    """Keys and values of the completions' own tokens, [L, S, K, C, N]."""
    hidden: Float[Array, "S D"]
    """Final hidden state from which the next token is drawn."""
    key: Key[Array, "S"]
    row: Int[Array, "S"]
    """Within the part."""
    sample: Int[Array, "S"]
    length: Int[Array, "S"]
    """Tokens drawn so far."""
    active: Bool[Array, "S"]


class Work(NamedTuple):
    """Counters over bursts."""

    slot_steps: Int[Array, ""]
    """Decode steps times slots."""
    tokens: Int[Array, ""]


class DecodeState(NamedTuple):
    """All that decoding keeps on the device."""

    prompts: Prompts
    outputs: Outputs
    slots: Slots
    column: Int[Array, ""]
    """Of the slots' caches, where keys and values of the next tokens go: a ring, in which all slots write one column
    in each step and a completion's own are the latest."""
    next: Int[Array, "P"]
    """Place in the queue of each part's next completion."""
    work: Work


class Queue(NamedTuple):
    """Completions whose prompts are in their rows, as the host lines them up for a burst.

    Place i of a part's queue, for i below `end`, is sample i mod G of the prompt in row ring[(i div G) mod r].
    """

    ring: Int[Array, "P r"]
    """r = R / P rows in the order in which they were filled."""
    end: Int[Array, "P"]
    cancelled: Bool[Array, "P r G"]
    """Completions that are to end."""
    closed: Bool[Array, ""]
    """No more will be lined up."""


class Report(NamedTuple):
    """What the host reads of a burst, while the next one runs."""

    outputs: Outputs
    work: Work
    slots_needed: Int[Array, ""]
    """Of each part: all, until the queue is closed and empty; then no more than are active where most are."""


class NewPrompts(NamedTuple):
    """Prompts to be run into rows; a row beyond the part marks padding, which leaves no trace."""

    prompts: PromptBatch
    heard: Float[Array, "B A D"]
    key: Key[Array, "B"]
    limit: Int[Array, "B G"]
    row: Int[Array, "P b"]
    """Within the part; b = B / P."""


def empty_state(
    spec: ThinkerSpec, *, parts: int, rows: int, slots: int, generations: int, prompt_length: int, length: int
) -> DecodeState:
    """A state in which nothing decodes; `length` is that of the longest completion."""
    decoder, dtype = spec.decoder, compute_dtype(spec)

    def cache(sequences: int, length: int) -> KeysValues:
        shape = (decoder.layers, sequences, decoder.kv_heads, length, decoder.head_width)
        return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def zeros(*shape: int) -> Int[Array, "*shape"]:
        return jnp.zeros(shape, jnp.int32)

    def keys(count: int) -> Key[Array, "count"]:
        return jax.random.split(jax.random.key(0), count)

    return DecodeState(
        Prompts(
            cache(rows, prompt_length),
            zeros(rows),
            jnp.zeros((rows, decoder.width), dtype),
            keys(rows),
            zeros(rows, prompt_length),
        ),
        Outputs(
            zeros(rows, generations, length),
            jnp.zeros((rows, generations, length), jnp.float32),
            jnp.zeros((rows, generations, length), jnp.float32),
            zeros(rows, generations),
            zeros(rows, generations),
            jnp.zeros((rows, generations), bool),
            _empty_routes(spec, (rows, prompt_length), (rows, generations, length)),
        ),
        Slots(
            cache=cache(slots, length),
            hidden=jnp.zeros((slots, decoder.width), dtype),
            key=keys(slots),
            row=zeros(slots),
            sample=zeros(slots),
            length=zeros(slots),
            active=jnp.zeros(slots, bool),
        ),
        zeros(),
        zeros(parts),
        Work(zeros(), zeros()),
    )


def _empty_routes(spec: ThinkerSpec, prompts: tuple[int, ...], completions: tuple[int, ...]) -> Routes | None:
    if not spec.router_replay:
        return None
    dtype, width = route_dtype(spec.decoder), routes_width(spec.decoder)
    return Routes(jnp.zeros((*prompts, width), dtype), jnp.zeros((*completions, width), dtype))
