"""One workload through the engine: prompts into rows, bursts one after another, results as they are done."""

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key

from audio_grpo.model.table import Weights
from audio_grpo.rollout.compiled import EnginePrograms
from audio_grpo.rollout.scheduler import Prefill, Scheduler
from audio_grpo.rollout.settings import WorkloadShape
from audio_grpo.rollout.state import DecodeState, NewPrompts, Outputs, Queue, Report
from audio_grpo.rollout.stop_strings import StopStrings
from audio_grpo.types import Completion, FinishReason, PromptBatch, RequestResult

CANCELLED = "cancelled"
"""Reason of a request that was cancelled."""

_IN_FLIGHT = 2
"""Bursts given to the device before the first of them is looked at, so that it never waits for the host."""

Listen = Callable[[Sequence[int | None]], Float[Array, "b A D"]]
"""Gives the audio embeddings of the prompts with these indices; where there is None, anything."""


@dataclass(slots=True)
class EngineStats:
    """What a workload cost."""

    prompts: int = 0
    """Prefilled."""
    prefills: int = 0
    """Calls of the prefill program."""
    bursts: int = 0
    slot_steps: int = 0
    """Decode steps times slots."""
    tokens: int = 0
    """Sampled."""
    slots: int = 0
    """At the start; they become fewer when few completions are left."""

    @property
    def utilisation(self) -> float:
        """Share of slot steps that gave a token."""
        return self.tokens / max(1, self.slot_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts to be answered."""

    prompts: PromptBatch
    """On the host."""
    listen: Listen
    ids: Sequence[str]
    limits: Int32[np.ndarray, "B G"]
    """Tokens that each completion may have."""
    seed: int


class Generation:
    """Answers a workload; an iterator of (prompt index, result) in the order in which prompts are done."""

    def __init__(
        self,
        programs: EnginePrograms,
        weights: Weights,
        allowed: Bool[Array, "V"],
        stop: tuple[int, ...],
        stop_strings: StopStrings,
        work: Workload,
        shape: WorkloadShape,
    ) -> None:
        self.stats = EngineStats(slots=shape.slots)
        self._programs, self._weights, self._allowed, self._stop = programs, weights, allowed, stop
        self._stop_strings, self._work, self._shape = stop_strings, work, shape
        self._keys = _prompt_keys(work.seed, work.ids)
        self._scheduler = Scheduler(
            parts=shape.parts, rows=shape.rows, prompts=len(work.ids), generations=shape.generations
        )
        self._since: dict[tuple[int, int], int] = {}
        """First burst that decodes the prompt now in a row: older reports are of the one before."""
        self._cancelled: set[int] = set()
        self._dropped: list[int] = []
        """Cancelled while they waited, and not yet told."""

    def cancel(self, prompt: int) -> None:
        """End a prompt's completions; its result says so, unless it was given out before."""
        if self._scheduler.cancel(prompt):
            self._dropped.append(prompt)
        self._cancelled.add(prompt)

    def __iter__(self) -> Iterator[tuple[int, RequestResult]]:
        """Drive the device until all prompts are answered."""
        state = self._programs.empty_state(self._shape)
        flying: deque[tuple[int, Report]] = deque()
        while not self._scheduler.done:
            state = self._prefill(state, self._scheduler.admit())
            queue = Queue(*map(jnp.asarray, self._scheduler.queue()))
            state, report = self._programs.burst(self._shape.narrow_at, self._weights, self._allowed, state, queue)
            flying.append((self.stats.bursts, report))
            self.stats.bursts += 1
            if len(flying) == _IN_FLIGHT:
                burst, report = flying.popleft()
                yield from self._taken(burst, report)
                state = self._narrowed(state, int(report.slots_needed))
            yield from self._told_dropped()
        yield from self._told_dropped()

    def _narrowed(self, state: DecodeState, needed: int) -> DecodeState:
        """What no completion will come to is left out of the steps that are left."""
        shape = self._shape.narrowed(needed)
        if shape == self._shape:
            return state
        self._shape = shape
        return state._replace(slots=self._programs.narrow(state.slots, shape.parts, shape.slots))

    def _prefill(self, state: DecodeState, prefills: Sequence[Prefill]) -> DecodeState:
        shape = self._shape
        size, rows_of_part = shape.prefill // shape.parts, shape.rows // shape.parts
        waiting = [[x for x in prefills if x.part == part] for part in range(shape.parts)]
        for first in range(0, max(map(len, waiting)), size):
            indices = np.zeros((shape.parts, size), np.int32)
            rows = np.full((shape.parts, size), rows_of_part, np.int32)  # beyond the part: padding
            for part, of_part in enumerate(waiting):
                for i, prefill in enumerate(of_part[first : first + size]):
                    indices[part, i], rows[part, i] = prefill.prompt, prefill.row
                    self._since[part, prefill.row] = self.stats.bursts
                    self.stats.prompts += 1
            state = self._programs.prefill(self._weights, state, self._new_prompts(indices.reshape(-1), rows))
            self.stats.prefills += 1
        return state

    def _new_prompts(self, indices: Int32[np.ndarray, "B"], rows: Int32[np.ndarray, "P b"]) -> NewPrompts:
        prompts = self._work.prompts
        length = self._bucket(int(prompts.true_length[indices].max()))
        real = (rows < self._shape.rows // self._shape.parts).reshape(-1)
        return NewPrompts(
            prompts=PromptBatch(prompts.tokens[indices, :length], prompts.true_length[indices]),
            heard=self._work.listen([int(i) if there else None for i, there in zip(indices, real, strict=True)]),
            key=self._keys[indices],
            limit=jnp.asarray(self._work.limits[indices]),
            row=jnp.asarray(rows),
        )

    def _bucket(self, length: int) -> int:
        """The whole or half of the prompt length, whichever holds the longest prompt: two programs at most."""
        whole = self._work.prompts.tokens.shape[1]
        half = -(-whole // 2)
        return half if length <= half else whole

    def _taken(self, burst: int, report: Report) -> Iterator[tuple[int, RequestResult]]:
        """Results of the rows that a report shows done, whose rows are free from now on."""
        done, work = jax.device_get((report.outputs.done, report.work))
        self.stats.slot_steps, self.stats.tokens = int(work.slot_steps), int(work.tokens)
        seen = [
            (part, row, self._whole_row(part, row), prompt)
            for (part, row), prompt in self._scheduler.residents.items()
            if self._since[part, row] <= burst
        ]
        ready = [place for place in seen if done[place[2]].all()]
        if not ready and not self._stop_strings:
            return
        outputs = jax.device_get(report.outputs)
        for part, row, whole, _ in seen if self._stop_strings else ():
            for sample, tokens in enumerate(outputs.tokens[whole]):
                if self._stop_strings.end(tokens[: outputs.length[whole, sample]]) is not None:
                    self._scheduler.end(part, row, sample)
        for part, row, whole, prompt in ready:
            self._scheduler.free(part, row)
            if prompt in self._cancelled:
                yield prompt, self._failed(prompt)
                continue
            completions = tuple(self._completion(outputs, whole, g) for g in range(self._shape.generations))
            length = self._work.prompts.true_length[prompt]
            routes = None if outputs.routes is None else np.array(outputs.routes.prompts[whole, :length])
            yield prompt, RequestResult(id=self._work.ids[prompt], completions=completions, prompt_routes=routes)

    def _completion(self, outputs: Outputs, row: int, sample: int) -> Completion:
        count = int(outputs.length[row, sample])
        end = self._stop_strings.end(np.asarray(outputs.tokens[row, sample, :count]))
        tokens, log_probs, log_kept = (np.array(values[row, sample, : end or count]) for values in outputs[:3])
        reason: FinishReason = "stop" if end or int(tokens[-1]) in self._stop else "length"
        routes = None if outputs.routes is None else np.array(outputs.routes.completions[row, sample, : end or count])
        return Completion(token_ids=tokens, logprobs=log_probs, log_kept=log_kept, finish_reason=reason, routes=routes)

    def _whole_row(self, part: int, row: int) -> int:
        return part * (self._shape.rows // self._shape.parts) + row

    def _told_dropped(self) -> Iterator[tuple[int, RequestResult]]:
        while self._dropped:
            prompt = self._dropped.pop()
            yield prompt, self._failed(prompt)

    def _failed(self, prompt: int) -> RequestResult:
        return RequestResult(id=self._work.ids[prompt], completions=(), error=CANCELLED)


def _prompt_keys(seed: int, ids: Sequence[str]) -> Key[Array, "B"]:
    """A random key for each prompt, from seed and id alone."""
    names = jnp.asarray([zlib.crc32(name.encode()) for name in ids], jnp.uint32)
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(names)
