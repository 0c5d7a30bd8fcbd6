"""`OfflineEngine`: answers prompts with continuous batching; each clip is heard once, each prompt prefilled once."""

import zlib
from collections.abc import Callable, Sequence
from functools import partial

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
from audio_grpo.parallel.mesh import batch_shards, single_device_mesh
from audio_grpo.rollout import programs
from audio_grpo.rollout.compiled import EnginePrograms
from audio_grpo.rollout.scheduler import Prefill, Scheduler, Start, membership
from audio_grpo.rollout.settings import EngineSettings, WorkloadShape, engine_settings, workload_shape
from audio_grpo.text import family_special_tokens
from audio_grpo.types import AudioBatch, Completion, FinishReason, InputData, PromptBatch, RequestResult, SpecialTokens

Listen = Callable[[Sequence[int]], Float[Array, "b A D"]]
"""Gives the audio embeddings of the prompts with these indices."""


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
        self._programs = EnginePrograms(self.spec, self.settings, self.special, self._mesh)

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
        return self._programs.hear(self.weights, audio)

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
        shape = workload_shape(self.settings, batch_shards(self._mesh), count, generations)
        sizes = {"slots": shape.slots, "rows": shape.rows, "parts": shape.parts}
        scheduler = Scheduler(**sizes, prompts=count, generations=generations)
        keys = _sample_keys(self.settings.seed if seed is None else seed, ids, generations)
        results: list[list[Completion | None]] = [[None] * generations for _ in ids]
        state = self._programs.empty_state(shape)
        while not scheduler.done:
            prefills, starts = scheduler.admit()
            state = self._run_prefills(state, shape, prompts, listen, prefills)
            state = self._run_starts(state, shape, keys, starts)
            members = membership(scheduler.running, **sizes, width=shape.width)
            state = self._programs.burst(self.weights, self._allowed, state, Membership(*map(jnp.asarray, members)))
            for start, completion in _take_finished(scheduler, state.slots, self.special.stop):
                results[start.prompt][start.sample] = completion
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

    def _run_prefills(
        self,
        state: programs.DecodeState,
        shape: WorkloadShape,
        prompts: PromptBatch,
        listen: Listen,
        prefills: Sequence[Prefill],
    ) -> programs.DecodeState:
        parts, size, rows_of_part = shape.parts, shape.prefill // shape.parts, shape.rows // shape.parts
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
            state = self._programs.prefill(weights=self.weights, state=state, prompts=chosen, heard=heard, rows=rows)
        return state

    def _run_starts(
        self, state: programs.DecodeState, shape: WorkloadShape, keys: Array, starts: Sequence[Start]
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
        return self._programs.admit(state=state, admission=admission)


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
