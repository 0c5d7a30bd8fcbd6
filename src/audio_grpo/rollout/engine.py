"""`OfflineEngine`: answers prompts with continuous batching; each clip is heard once, each prompt prefilled once."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from audio_grpo.audio import audio_token_count
from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.model.attention import Membership
from audio_grpo.model.spec import ThinkerSpec, thinker_spec
from audio_grpo.model.table import Weights
from audio_grpo.model.thinker import hear
from audio_grpo.parallel.mesh import batch_shards, single_device_mesh
from audio_grpo.rollout import programs
from audio_grpo.rollout.sampler import Sampling
from audio_grpo.rollout.scheduler import Prefill, Scheduler, Start, membership
from audio_grpo.rollout.sharding import state_sharding
from audio_grpo.text import family_special_tokens
from audio_grpo.types import AudioBatch, Completion, FinishReason, InputData, PromptBatch, RequestResult, SpecialTokens

_PREFILL_PROMPTS = 8
"""Prompts run in one prefill at most."""

Listen = Callable[[Sequence[int]], Float[Array, "b A D"]]
"""Gives the audio embeddings of the prompts with these indices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Sizes that fix the engine's compiled programs."""

    prompt_length: int
    """T: tokens of the longest prompt."""
    completion_length: int
    """C: tokens of the longest completion."""
    generations: int
    """G: completions of each prompt."""
    max_slots: int
    """Completions that decode together at most."""
    burst: int
    """Tokens decoded in one dispatch."""
    sampling: Sampling
    seed: int


def engine_settings(config: Config) -> EngineSettings:
    """Settings of a training run's rollouts."""
    return EngineSettings(
        prompt_length=config.max_prefill_predict_length,
        completion_length=config.max_completion_length,
        generations=config.num_generations,
        max_slots=config.max_slots,
        burst=config.decode_burst,
        sampling=Sampling(
            greedy=config.decode_sampling_strategy == "greedy",
            temperature=config.decode_sampling_temperature,
            top_k=config.decode_sampling_top_k,
            top_p=config.decode_sampling_nucleus_p,
        ),
        seed=config.seed,
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    """Slots and rows for one workload."""

    slots: int
    rows: int
    width: int
    prefill: int


class OfflineEngine:
    """Samples completions from a thinker.

    `weights` may be replaced between calls: rollout and learning share one set. What is sampled depends on the seed,
    the request's id, the sample's index and the token's position alone.
    """

    def __init__(
        self,
        config: Config,
        weights: Weights,
        *,
        mesh: Mesh | None = None,
        special: SpecialTokens | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        self.weights = weights
        self._mesh = mesh or single_device_mesh(jax.devices()[0])
        self.spec: ThinkerSpec = thinker_spec(config, self._mesh)
        self.settings = settings or engine_settings(config)
        self.special = special or family_special_tokens(config.decoder_block, config.vocab_size)
        self._allowed = jnp.asarray(_allowed_tokens(self.special, config.vocab_size))
        self._states: dict[_Shape, programs.DecodeState] = {}

    def batch_inference(
        self, inputs: Sequence[InputData], *, num_generations: int | None = None, seed: int | None = None
    ) -> list[RequestResult]:
        """Answer each prompt `num_generations` times (the configuration's number by default), in request order.

        Raises:
            UserError: a prompt is too long, or its placeholders do not match its audio.
        """
        for request in inputs:
            self._check(request)
        frames = max((x.audio_features.shape[1] for x in inputs if x.audio_features is not None), default=0)

        def listen(indices: Sequence[int]) -> Float[Array, "b A D"]:
            return self.hear(self._audio_batch([inputs[i] for i in indices], frames))

        tokens = np.full((len(inputs), self.settings.prompt_length), self.special.pad, np.int32)
        for row, request in zip(tokens, inputs, strict=True):
            row[: request.true_length] = request.tokens[: request.true_length]
        prompts = PromptBatch(tokens, np.asarray([x.true_length for x in inputs], np.int32))
        return self.generate(prompts, listen, [x.id for x in inputs], generations=num_generations, seed=seed)

    def hear(self, audio: AudioBatch) -> Float[Array, "B A D"]:
        """Audio embeddings of B clips."""
        if audio.features.shape[2] == 0:
            return jnp.zeros((audio.features.shape[0], 0, self.spec.decoder.width))
        return self._hear(self.weights, audio)

    def generate(
        self,
        prompts: PromptBatch,
        listen: Listen,
        ids: Sequence[str],
        *,
        generations: int | None = None,
        seed: int | None = None,
    ) -> list[RequestResult]:
        """Answer padded prompts whose audio embeddings come from `listen`; results in the prompts' order."""
        count, generations = len(ids), generations or self.settings.generations
        if count == 0:
            return []
        shape = self._shape(count, generations)
        sizes = {"slots": shape.slots, "rows": shape.rows, "parts": batch_shards(self._mesh)}
        scheduler = Scheduler(**sizes, prompts=count, generations=generations)
        keys = _sample_keys(self.settings.seed if seed is None else seed, ids, generations)
        results: list[list[Completion | None]] = [[None] * generations for _ in ids]
        state = self._states.pop(shape, None) or self._empty_state(shape)
        while not scheduler.done:
            prefills, starts = scheduler.admit()
            state = self._run_prefills(state, shape, prompts, listen, prefills)
            state = self._run_starts(state, shape, keys, starts)
            members = membership(scheduler.running, **sizes, width=shape.width)
            state = self._burst(self.weights, self._allowed, state, Membership(*map(jnp.asarray, members)))
            for start, completion in _take_finished(scheduler, state.slots, self.special.stop):
                results[start.prompt][start.sample] = completion
        self._states[shape] = state
        return [RequestResult(id=i, completions=_all_present(row)) for i, row in zip(ids, results, strict=True)]

    def _check(self, request: InputData) -> None:
        if not 0 < request.true_length <= min(len(request.tokens), self.settings.prompt_length):
            raise UserError(
                f"Request {request.id}: true_length {request.true_length} must lie between 1 and the smaller of its "
                f"{len(request.tokens)} tokens and the engine's prompt length {self.settings.prompt_length}."
            )
        placeholders = int((request.tokens[: request.true_length] == self.special.audio_pad).sum())
        audible = int(audio_token_count(_frames(request), self.spec.audio.chunk_frames))
        if placeholders != audible:
            raise UserError(
                f"Request {request.id} has {placeholders} audio placeholders (token {self.special.audio_pad}), but its "
                f"{_frames(request)} mel frames give {audible} audio tokens: repeat the placeholder {audible} times."
            )

    def _audio_batch(self, requests: Sequence[InputData], frames: int) -> AudioBatch:
        features = np.zeros((len(requests), self.spec.audio.mel_bins, frames), np.float32)
        for row, request in zip(features, requests, strict=True):
            if request.audio_features is not None:
                row[:, : request.audio_features.shape[1]] = request.audio_features
        return AudioBatch(features, np.asarray([_frames(request) for request in requests], np.int32))

    def _shape(self, prompts: int, generations: int) -> _Shape:
        """Slots for the whole workload if they fit; rows for twice the prompts that fill the slots, for stragglers.

        All are counted for each part of the mesh first: its prompts, its share of `max_slots`.
        """
        parts = batch_shards(self._mesh)
        prompts = -(-prompts // parts)
        slots = min(-(-self.settings.max_slots // parts), prompts * generations)
        filling = -(-slots // generations)
        return _Shape(
            slots=slots * parts,
            rows=min(prompts, 2 * filling) * parts,
            width=min(generations, slots),
            prefill=min(filling, -(-_PREFILL_PROMPTS // parts)) * parts,
        )

    def _empty_state(self, shape: _Shape) -> programs.DecodeState:
        build = partial(
            programs.empty_state,
            self.spec,
            rows=shape.rows,
            slots=shape.slots,
            prompt_length=self.settings.prompt_length,
            completion_length=self.settings.completion_length,
        )
        return jax.jit(build, out_shardings=self._state_sharding)()

    @cached_property
    def _state_sharding(self) -> programs.DecodeState:
        return state_sharding(self._mesh)

    @cached_property
    def _hear(self) -> Callable[..., Any]:
        return jax.jit(partial(hear, self.spec))

    @cached_property
    def _prefill(self) -> Callable[..., Any]:
        program = partial(programs.prefill_rows, self.spec, audio_pad=self.special.audio_pad)
        return jax.jit(program, donate_argnames="state", out_shardings=self._state_sharding)

    @cached_property
    def _admit(self) -> Callable[..., Any]:
        return jax.jit(programs.admit, donate_argnames="state", out_shardings=self._state_sharding)

    @cached_property
    def _burst(self) -> Callable[..., Any]:
        sizes = (self.settings.sampling, self.special.stop, self.settings.burst)
        program = partial(programs.decode_burst, self.spec, *sizes)
        return jax.jit(program, donate_argnums=2, out_shardings=self._state_sharding)

    def _run_prefills(
        self,
        state: programs.DecodeState,
        shape: _Shape,
        prompts: PromptBatch,
        listen: Listen,
        prefills: Sequence[Prefill],
    ) -> programs.DecodeState:
        parts = batch_shards(self._mesh)
        size, rows_of_part = shape.prefill // parts, shape.rows // parts
        waiting = [[x for x in prefills if x.row // rows_of_part == part] for part in range(parts)]
        for first in range(0, max(map(len, waiting)), size):
            indices = np.zeros((parts, size), np.int32)
            rows = np.full((parts, size), rows_of_part, np.int32)  # beyond the part: not written
            for part, queue in enumerate(waiting):
                for i, prefill in enumerate(queue[first : first + size]):
                    indices[part, i], rows[part, i] = prefill.prompt, prefill.row % rows_of_part
            flat = indices.reshape(-1)
            chosen = PromptBatch(prompts.tokens[flat], prompts.true_length[flat])
            heard = listen(flat.tolist())
            state = self._prefill(weights=self.weights, state=state, prompts=chosen, heard=heard, rows=rows)
        return state

    def _run_starts(
        self, state: programs.DecodeState, shape: _Shape, keys: Array, starts: Sequence[Start]
    ) -> programs.DecodeState:
        if not starts:
            return state
        padding = shape.slots - len(starts)
        flat = [x.prompt * keys.shape[1] + x.sample for x in starts] + [0] * padding
        admission = programs.Admission(
            slot=jnp.asarray([x.slot for x in starts] + [shape.slots] * padding),
            row=jnp.asarray([x.row for x in starts] + [0] * padding),
            key=keys.reshape(-1)[np.asarray(flat)],
            limit=jnp.full(shape.slots, self.settings.completion_length),
        )
        return self._admit(state=state, admission=admission)


def _allowed_tokens(special: SpecialTokens, vocab: int) -> np.ndarray:
    allowed = np.ones(vocab, bool)
    for first, end in special.never_sampled:
        allowed[first:end] = False
    return allowed


def _frames(request: InputData) -> int:
    if request.audio_features is None:
        return 0
    return request.audio_features.shape[1] if request.audio_mask is None else int(request.audio_mask.sum())


def _sample_keys(seed: int, ids: Sequence[str], generations: int) -> Array:
    """Random keys [B, G], each from (seed, request id, sample index)."""
    names = jnp.asarray([zlib.crc32(name.encode()) for name in ids], jnp.uint32)
    requests = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(names)
    return jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(generations)))(requests)


def _take_finished(
    scheduler: Scheduler, slots: programs.Slots, stop: tuple[int, ...]
) -> list[tuple[Start, Completion]]:
    active, length = jax.device_get((slots.active, slots.length))
    finished = [slot for slot in scheduler.running if not active[slot]]
    if not finished:
        return []
    tokens, log_probs = jax.device_get((slots.tokens, slots.log_probs))
    taken = []
    for slot in finished:
        ids = tokens[slot, : length[slot]]
        reason: FinishReason = "stop" if int(ids[-1]) in stop else "length"
        completion = Completion(
            token_ids=ids.copy(), logprobs=log_probs[slot, : length[slot]].copy(), finish_reason=reason
        )
        taken.append((scheduler.finish(slot), completion))
    return taken


def _all_present(row: Sequence[Completion | None]) -> tuple[Completion, ...]:
    present = tuple(completion for completion in row if completion is not None)
    if len(present) != len(row):
        raise RuntimeError("The scheduler ended before every completion had finished.")
    return present
