"""The engine's compiled programs: prefill of prompts, and a burst of decode steps that also refills its slots.

Completions wait in a queue on the device. As soon as a slot is free, within the burst, it takes the next one, so slots
idle only when nothing waits; the host looks in between bursts, one burst late, and has new prompts run into rows whose
completions are all done.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from audio_grpo.model.attention import Membership, Segment
from audio_grpo.model.decoder import KeysValues
from audio_grpo.model.spec import ThinkerSpec
from audio_grpo.model.table import Weights
from audio_grpo.model.thinker import Kept, extend, output_head, prefill
from audio_grpo.parallel.activations import FEW_TOKENS, Placement
from audio_grpo.rollout.sampler import Sampling, draw, drawable
from audio_grpo.rollout.state import DecodeState, NewPrompts, Outputs, Prompts, Queue, Report, Slots, Work
from audio_grpo.types import Routes


def prefill_rows(
    spec: ThinkerSpec, weights: Weights, state: DecodeState, new: NewPrompts, audio_pad: int
) -> DecodeState:
    """Run prompts into rows of the prompt cache and clear the rows' outputs."""
    hidden, kept = prefill(spec, weights, new.prompts, new.heard, audio_pad)
    cache = kept.cache
    old, parts = state.prompts, new.row.shape[0]
    length = new.prompts.tokens.shape[1]

    def put(old: Array, new_values: Array) -> Array:
        old_parts, new_parts = (x.reshape(parts, -1, *x.shape[1:]) for x in (old, new_values))
        put_part = jax.vmap(lambda o, n, r: o.at[r].set(n, mode="drop"))
        return put_part(old_parts, new_parts, new.row).reshape(old.shape)

    def put_positions(old: Float[Array, "L R K T N"], fresh: Float[Array, "L B K t N"]) -> Float[Array, "L R K T N"]:
        old_parts, new_parts = (x.reshape(x.shape[0], parts, -1, *x.shape[2:]) for x in (old, fresh))
        put_part = jax.vmap(lambda o, n, r: o.at[:, r, :, :length].set(n, mode="drop"), (1, 1, 0), 1)
        return put_part(old_parts, new_parts, new.row).reshape(old.shape)

    def put_routes(old: Routes | None, fresh: Int[Array, "B t Lk"] | None) -> Routes | None:
        if old is None or fresh is None:
            return old
        rest = old.prompts.shape[1] - length
        return old._replace(prompts=put(old.prompts, jnp.pad(fresh, ((0, 0), (0, rest), (0, 0)))))

    outputs, count = state.outputs, new.limit.shape
    return state._replace(
        prompts=Prompts(
            KeysValues(put_positions(old.cache.keys, cache.keys), put_positions(old.cache.values, cache.values)),
            put(old.length, new.prompts.true_length),
            put(old.hidden, hidden),
            put(old.key, new.key),
            put(old.tokens, jnp.pad(new.prompts.tokens, ((0, 0), (0, old.tokens.shape[1] - length)))),
        ),
        outputs=outputs._replace(
            length=put(outputs.length, jnp.zeros(count, jnp.int32)),
            limit=put(outputs.limit, new.limit),
            done=put(outputs.done, jnp.zeros(count, bool)),
            routes=put_routes(outputs.routes, kept.routes),
        ),
    )


def decode_burst(
    spec: ThinkerSpec,
    sampling: Sampling,
    stop: tuple[int, ...],
    steps: int,
    fewest: int,
    weights: Weights,
    allowed: Bool[Array, "V"],
    state: DecodeState,
    queue: Queue,
) -> tuple[DecodeState, Report]:
    """Up to `steps` decode steps; ends early when nothing is left to decode, or no more than `fewest` slots needed."""
    # Once for the burst: within the loop, narrower weights would be widened again for every token.
    weights = {key: value.astype(state.slots.hidden.dtype) for key, value in weights.items()}
    state = _cancel(state, queue)
    width = min(state.outputs.done.shape[1], state.slots.active.shape[0] // queue.end.shape[0])

    def more(carry: tuple[Int[Array, ""], DecodeState, Membership]) -> Bool[Array, ""]:
        done, state, _ = carry
        left = state.slots.active.any() | (state.next < queue.end).any()
        return (done < steps) & left & (_slots_needed(state, queue) > fewest)

    def step(
        carry: tuple[Int[Array, ""], DecodeState, Membership],
    ) -> tuple[Int[Array, ""], DecodeState, Membership]:
        done, state, membership = carry
        idle = ~state.slots.active.reshape(queue.end.shape[0], -1).all(axis=1)

        def refill() -> tuple[DecodeState, Membership]:
            filled = _refill(state, queue)
            return filled, _membership(filled, width)

        refilled = jax.lax.cond((idle & (state.next < queue.end)).any(), refill, lambda: (state, membership))
        return done + 1, _decode_step(spec, sampling, stop, weights, allowed, *refilled), refilled[1]

    start = (jnp.int32(0), state, _membership(state, width))
    _, state, _ = jax.lax.while_loop(more, step, start)
    return state, Report(state.outputs, state.work, _slots_needed(state, queue))


def narrow_slots(slots: Slots, parts: int, count: int) -> Slots:
    """Keep `count` slots, all active ones among them."""
    kept = jnp.argsort(~slots.active.reshape(parts, -1), axis=1)[:, : count // parts]

    def keep(values: Array, axis: int = 0) -> Array:
        before, after = values.shape[:axis], values.shape[axis + 1 :]
        take = jax.vmap(lambda part, index: jnp.take(part, index, axis=axis), (axis, 0), axis)
        return take(values.reshape(*before, parts, -1, *after), kept).reshape(*before, count, *after)

    return Slots(KeysValues(*(keep(x, 1) for x in slots.cache)), *(keep(x) for x in slots[1:]))


def _slots_needed(state: DecodeState, queue: Queue) -> Int[Array, ""]:
    """What `Report.slots_needed` says."""
    active = state.slots.active.reshape(queue.end.shape[0], -1)
    drained = queue.closed & (state.next >= queue.end).all()
    return jnp.where(drained, active.sum(axis=1).max(), active.shape[1])


def _cancel(state: DecodeState, queue: Queue) -> DecodeState:
    """End cancelled completions that decode; those that still wait end when their turn comes."""
    slots = state.slots
    row = _global_row(state, slots.row)
    ended = slots.active & queue.cancelled.reshape(-1, queue.cancelled.shape[2])[row, slots.sample]
    return state._replace(
        slots=slots._replace(active=slots.active & ~ended), outputs=_done(state.outputs, ended, row, slots.sample)
    )


def _done(outputs: Outputs, ended: Bool[Array, "S"], row: Int[Array, "S"], sample: Int[Array, "S"]) -> Outputs:
    at = (jnp.where(ended, row, outputs.done.shape[0]), sample)
    return outputs._replace(done=outputs.done.at[at].set(True, mode="drop"))


def _refill(state: DecodeState, queue: Queue) -> DecodeState:
    """Give idle slots the next completions of their part's queue."""
    slots = state.slots
    parts, generations = queue.end.shape[0], state.outputs.done.shape[1]
    idle = ~slots.active.reshape(parts, -1)
    place = state.next[:, None] + jnp.cumsum(idle, axis=1) - 1
    taken = idle & (place < queue.end[:, None])
    row = jnp.take_along_axis(queue.ring, place // generations % queue.ring.shape[1], axis=1).reshape(-1)
    sample, begins = (place % generations).reshape(-1), taken.reshape(-1)
    row, sample = jnp.where(begins, row, slots.row), jnp.where(begins, sample, slots.sample)
    whole = _global_row(state, row)
    dropped = begins & queue.cancelled.reshape(-1, generations)[whole, sample]
    fresh = jax.vmap(jax.random.fold_in)(state.prompts.key[whole], sample)
    return state._replace(
        slots=slots._replace(
            hidden=jnp.where(begins[:, None], state.prompts.hidden[whole], slots.hidden),
            key=jnp.where(begins, fresh, slots.key),
            row=row,
            sample=sample,
            length=jnp.where(begins, 0, slots.length),
            active=jnp.where(begins, ~dropped, slots.active),
        ),
        outputs=_done(state.outputs, dropped, whole, sample),
        next=state.next + taken.sum(axis=1),
    )


def _membership(state: DecodeState, width: int) -> Membership:
    """Active slots of each row, in their order; idle slots stand at place 0, where nobody reads what they find."""
    parts = state.next.shape[0]
    rows = state.prompts.length.shape[0] // parts
    row, active = state.slots.row.reshape(parts, -1), state.slots.active.reshape(parts, -1)
    earlier = jnp.tril(jnp.ones((row.shape[1], row.shape[1]), bool), -1)
    same = (row[:, :, None] == row[:, None, :]) & active[:, None, :]
    place = row * width + (same & earlier).sum(axis=2)

    def list_members(place: Int[Array, "s"], active: Bool[Array, "s"]) -> Int[Array, "r W"]:
        at = jnp.where(active, place, rows * width)
        members = jnp.zeros(rows * width, jnp.int32).at[at].set(jnp.arange(at.shape[0]), mode="drop")
        return members.reshape(rows, width)

    return Membership(jax.vmap(list_members)(place, active), jnp.where(active, place, 0))


def _global_row(state: DecodeState, row: Int[Array, "S"]) -> Int[Array, "S"]:
    """Rows counted over all parts."""
    parts = state.next.shape[0]
    part = jnp.arange(row.shape[0]) // (row.shape[0] // parts)
    return part * (state.prompts.length.shape[0] // parts) + row


def _decode_step(
    spec: ThinkerSpec,
    sampling: Sampling,
    stop: tuple[int, ...],
    weights: Weights,
    allowed: Bool[Array, "V"],
    state: DecodeState,
    membership: Membership,
) -> DecodeState:
    """Draw a token from each slot's hidden state, then run it to the next hidden state."""
    prompts, outputs, slots, column, _, work = state
    place = Placement(spec.mesh, FEW_TOKENS)
    whole = place(slots.hidden, "batch", None)
    uniform = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position), (2,)))
    row = _global_row(state, slots.row)
    drawn = draw(
        sampling,
        whole,
        output_head(weights),
        drawable(sampling, allowed, stop, slots.length),
        uniform(slots.key, slots.length),
        place,
        seen=None if sampling.repetition_penalty == 1 else _seen(state, row, allowed.shape[0]),
    )
    tokens = drawn.tokens
    at = jnp.where(slots.active, slots.length, outputs.tokens.shape[2])
    segments = [
        Segment(*prompts.cache, _earlier(prompts.cache, prompts.length), membership),
        Segment(*slots.cache, _latest(slots.cache, slots.length, column)),
    ]
    positions = (prompts.length[row] + slots.length)[:, None]
    hidden, kept = extend(spec, weights, tokens[:, None], positions, segments)

    length = slots.length + slots.active
    ended = jnp.isin(tokens, jnp.asarray(stop, jnp.int32)) | (length >= outputs.limit[row, slots.sample])
    written = (jnp.where(slots.active, row, outputs.done.shape[0]), slots.sample)
    return DecodeState(
        prompts,
        outputs._replace(
            tokens=outputs.tokens.at[(*written, at)].set(tokens, mode="drop"),
            log_probs=outputs.log_probs.at[(*written, at)].set(drawn.log_probs, mode="drop"),
            log_kept=outputs.log_kept.at[(*written, at)].set(drawn.log_kept, mode="drop"),
            length=outputs.length.at[written].set(length, mode="drop"),
            done=outputs.done.at[written].set(ended, mode="drop"),
            routes=_with_routes(outputs.routes, kept, (*written, at)),
        ),
        slots._replace(
            cache=KeysValues(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, fresh, column, axis=3)
                    for old, fresh in zip(slots.cache, kept.cache, strict=True)
                )
            ),
            hidden=hidden[:, 0],
            length=length,
            active=slots.active & ~ended,
        ),
        (column + 1) % slots.cache.keys.shape[3],
        state.next,
        Work(work.slot_steps + slots.active.shape[0], work.tokens + slots.active.sum()),
    )


def _with_routes(old: Routes | None, kept: Kept, at: tuple[Array, ...]) -> Routes | None:
    """The experts that each slot's token went to, in its place."""
    if old is None or kept.routes is None:
        return old
    return old._replace(completions=old.completions.at[at].set(kept.routes[:, 0], mode="drop"))


def _seen(state: DecodeState, row: Int[Array, "S"], vocab: int) -> Bool[Array, "S V"]:
    """Tokens of each slot's prompt and of its completion so far."""
    slots = state.slots
    prompt, own = state.prompts.tokens[row], state.outputs.tokens[row, slots.sample]
    in_prompt = jnp.arange(prompt.shape[1]) < state.prompts.length[row][:, None]
    in_own = jnp.arange(own.shape[1]) < slots.length[:, None]
    tokens = jnp.concatenate([jnp.where(in_prompt, prompt, vocab), jnp.where(in_own, own, vocab)], axis=1)
    return jnp.zeros((row.shape[0], vocab), bool).at[jnp.arange(row.shape[0])[:, None], tokens].set(True, mode="drop")


def _latest(cache: KeysValues, length: Int[Array, "S"], column: Int[Array, ""]) -> Bool[Array, "S 1 C"]:
    """True for each slot's latest `length` columns before `column` of the ring."""
    columns = cache.keys.shape[3]
    age = (column - 1 - jnp.arange(columns)) % columns
    return (age < length[:, None])[:, None, :]


def _earlier(cache: KeysValues, length: Int[Array, "R"]) -> Bool[Array, "R 1 T"]:
    """True for the cached positions below each row's length."""
    return (jnp.arange(cache.keys.shape[3]) < length[:, None])[:, None, :]
