"""`OfflineEngine`: answers prompts with continuous batching; each clip is heard once, each prompt prefilled once."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from audio_grpo.audio import audio_token_count
from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.model.spec import ThinkerSpec, thinker_spec
from audio_grpo.model.table import Weights
from audio_grpo.parallel.mesh import batch_shards, single_device_mesh
from audio_grpo.rollout.clip_store import ClipStore
from audio_grpo.rollout.compiled import EnginePrograms
from audio_grpo.rollout.generation import EngineStats, Generation, Listen, Workload
from audio_grpo.rollout.hearing import Hearing
from audio_grpo.rollout.result_stream import ResultStream
from audio_grpo.rollout.settings import EngineSettings, engine_settings, workload_shape
from audio_grpo.rollout.stop_strings import StopStrings
from audio_grpo.text import Tokenizer, family_special_tokens
from audio_grpo.types import AudioBatch, InputData, PromptBatch, RequestResult, SpecialTokens


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
        tokenizer: Tokenizer | None = None,
        store: ClipStore | None = None,
    ) -> None:
        """`tokenizer` is asked for by stop strings; `store` keeps the audio embeddings of clips for the next time.

        Raises:
            UserError: there are stop strings but no tokenizer.
        """
        self.weights = weights
        self._mesh = mesh or single_device_mesh(jax.devices()[0])
        self.spec: ThinkerSpec = thinker_spec(config, self._mesh)
        self.settings = settings or engine_settings(config)
        self.special = special or family_special_tokens(config.decoder_block, config.vocab_size)
        self._allowed = jnp.asarray(_allowed_tokens(self.special, config.vocab_size))
        self._programs = EnginePrograms(self.spec, self.settings, self.special, self._mesh)
        self._stop_strings = _stop_strings(self.settings.stop_strings, tokenizer)
        self.hearing = Hearing(self.spec, self._mesh, store)
        self.last_stats = EngineStats()
        """Of the newest workload."""

    def batch_inference(
        self,
        inputs: Sequence[InputData],
        *,
        num_generations: int | None = None,
        seed: int | None = None,
        max_new_tokens: Sequence[int] | None = None,
    ) -> list[RequestResult]:
        """Answer each prompt `num_generations` times (the configuration's number by default), in request order.

        A request that can not be answered fails alone: its result has no completions but an `error`.
        `max_new_tokens` has one number for each request.
        """
        options = {"num_generations": num_generations, "seed": seed, "max_new_tokens": max_new_tokens}
        results: dict[int, RequestResult] = dict(self.stream(inputs, **options))
        return [results[i] for i in range(len(inputs))]

    def stream(
        self,
        inputs: Sequence[InputData],
        *,
        num_generations: int | None = None,
        seed: int | None = None,
        max_new_tokens: Sequence[int] | None = None,
    ) -> ResultStream:
        """Like `batch_inference`, but each result with its request's index, as soon as it is there."""
        if max_new_tokens is not None and (len(max_new_tokens) != len(inputs) or min(max_new_tokens, default=1) < 1):
            raise UserError(
                f"max_new_tokens {list(max_new_tokens)[:8]} must have one number of at least 1 for each of "
                f"{len(inputs)} requests."
            )
        problems = {i: problem for i, request in enumerate(inputs) if (problem := self._problem(request))}
        sound = [i for i in range(len(inputs)) if i not in problems]
        limits = None if max_new_tokens is None else np.asarray(max_new_tokens, np.int32)[sound]
        return ResultStream(
            failed=[(i, RequestResult(id=inputs[i].id, completions=(), error=told)) for i, told in problems.items()],
            indices=sound,
            generation=self._generation_of([inputs[i] for i in sound], num_generations, seed, limits)
            if sound
            else None,
        )

    def _generation_of(
        self, inputs: Sequence[InputData], generations: int | None, seed: int | None, limits: np.ndarray | None
    ) -> Generation:
        longest = max((x.audio_features.shape[1] for x in inputs if x.audio_features is not None), default=0)
        frames = bucketed_frames(longest, self.spec.audio.chunk_frames)

        def listen(indices: Sequence[int | None]) -> Float[Array, "b A D"]:
            return self.hear(self._audio_batch([None if i is None else inputs[i] for i in indices], frames))

        tokens = np.full((len(inputs), self.settings.prompt_length), self.special.pad, np.int32)
        for row, request in zip(tokens, inputs, strict=True):
            row[: request.true_length] = request.tokens[: request.true_length]
        prompts = PromptBatch(tokens, np.asarray([x.true_length for x in inputs], np.int32))
        ids = [request.id for request in inputs]
        return self.start(prompts, listen, ids, generations=generations, seed=seed, limits=limits)

    def hear(self, audio: AudioBatch) -> Float[Array, "B A D"]:
        """Audio embeddings of B clips."""
        return self.hearing(self.weights, audio)

    def start(
        self,
        prompts: PromptBatch,
        listen: Listen,
        ids: Sequence[str],
        *,
        generations: int | None = None,
        seed: int | None = None,
        limits: Int32[np.ndarray, "B"] | None = None,
    ) -> Generation:
        """Begin to answer at least one prompt; iterate over what this returns to have it done.

        `limits` has the tokens that a prompt's completions may have, at most and by default the engine's length.
        """
        generations = generations or self.settings.generations
        longest = np.full(len(ids), self.settings.completion_length, np.int32)
        of_prompts = longest if limits is None else np.minimum(limits, longest)
        work = Workload(
            prompts=prompts,
            listen=listen,
            ids=ids,
            limits=np.repeat(of_prompts[:, None], generations, axis=1),
            seed=self.settings.seed if seed is None else seed,
        )
        shape = workload_shape(self.settings, batch_shards(self._mesh), len(ids), generations)
        generation = Generation(
            self._programs, self.weights, self._allowed, self.special.stop, self._stop_strings, work, shape
        )
        self.last_stats = generation.stats
        return generation

    def _problem(self, request: InputData) -> str | None:
        """Why a request can not be answered."""
        if not 0 < request.true_length <= min(len(request.tokens), self.settings.prompt_length):
            return (
                f"Request {request.id}: true_length {request.true_length} must lie between 1 and the smaller of its "
                f"{len(request.tokens)} tokens and the engine's prompt length {self.settings.prompt_length}."
            )
        placeholders = int((request.tokens[: request.true_length] == self.special.audio_pad).sum())
        audible = int(audio_token_count(_frames(request), self.spec.audio.chunk_frames))
        if placeholders != audible:
            return (
                f"Request {request.id} has {placeholders} audio placeholders (token {self.special.audio_pad}), but its "
                f"{_frames(request)} mel frames give {audible} audio tokens: repeat the placeholder {audible} times."
            )
        return None

    def _audio_batch(self, requests: Sequence[InputData | None], frames: int) -> AudioBatch:
        features = np.zeros((len(requests), self.spec.audio.mel_bins, frames), np.float32)
        for row, request in zip(features, requests, strict=True):
            if request is not None and request.audio_features is not None:
                row[:, : request.audio_features.shape[1]] = request.audio_features
        counts = [0 if request is None else _frames(request) for request in requests]
        return AudioBatch(features, np.asarray(counts, np.int32))


def bucketed_frames(frames: int, chunk: int) -> int:
    """Frames rounded up to 1, 2, 3, 4, 6, 8, 12, 16 … chunks, so that there are few programs for all lengths."""
    chunks = -(-frames // chunk)
    power = 1 << max(0, chunks - 1).bit_length()
    return chunk * (3 * power // 4 if power > 2 and 4 * chunks <= 3 * power else power if chunks else 0)


def _stop_strings(strings: tuple[str, ...], tokenizer: Tokenizer | None) -> StopStrings:
    if strings and tokenizer is None:
        raise UserError(f"stop_strings {list(strings)} need a tokenizer: give the engine one, or leave them out.")

    def decode(ids: Sequence[int]) -> str:
        assert tokenizer is not None
        return tokenizer.decode(ids, skip_special_tokens=False)

    return StopStrings(strings, decode)


def _allowed_tokens(special: SpecialTokens, vocab: int) -> np.ndarray:
    allowed = np.ones(vocab, bool)
    for first, end in special.never_sampled:
        allowed[first:end] = False
    return allowed


def _frames(request: InputData) -> int:
    if request.audio_features is None:
        return 0
    return request.audio_features.shape[1] if request.audio_mask is None else int(request.audio_mask.sum())
