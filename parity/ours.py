"""Our side of the comparison: a model that other software saved, read and run by ours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from audio_grpo.audio import audio_token_count
from audio_grpo.config import Config
from audio_grpo.grpo.log_probs import compute_log_probs
from audio_grpo.model.checkpoint import read_published, spec_from_published
from audio_grpo.model.spec import ThinkerSpec, thinker_spec
from audio_grpo.model.table import Weights
from audio_grpo.model.thinker import group_forward, hear, output_head, prefill, thinker_table
from audio_grpo.parallel.mesh import create_mesh
from audio_grpo.types import AudioBatch, PromptBatch
from parity.reference import SPECIAL


@dataclass(frozen=True)
class Ours:
    """A model read from a published folder."""

    config: Config
    weights: Weights

    @cached_property
    def spec(self) -> ThinkerSpec:
        """The model's sizes."""
        return thinker_spec(self.config)

    @cached_property
    def hear(self) -> Callable[[AudioBatch], jax.Array]:
        """Audio embeddings [B, A, D]."""
        return partial(jax.jit(partial(hear, self.spec)), self.weights)

    def prompt_logits(self, prompts: PromptBatch, heard: jax.Array) -> jax.Array:
        """Logits [B, V] after each prompt."""

        def run(weights: Weights, prompts: PromptBatch, heard: jax.Array) -> jax.Array:
            hidden, _ = prefill(self.spec, weights, prompts, heard, SPECIAL.audio_pad)
            return hidden @ output_head(weights).T

        return jax.jit(run)(self.weights, prompts, heard)

    def completion_logits(self, prompts: PromptBatch, heard: jax.Array, completions: np.ndarray) -> jax.Array:
        """Logits [B, G, C, V] that predict each completion token."""

        def run(weights: Weights, prompts: PromptBatch, heard: jax.Array) -> jax.Array:
            hidden = group_forward(self.spec, weights, prompts, heard, completions, SPECIAL.audio_pad).hidden
            return hidden @ output_head(weights).T

        return jax.jit(run)(self.weights, prompts, heard)

    @cached_property
    def log_probs(self) -> Callable[..., jax.Array]:
        """Log-probabilities [B, G, C] of completion tokens, from (prompts, heard, completions, temperature)."""

        def run(
            weights: Weights, prompts: PromptBatch, heard: jax.Array, completions: np.ndarray, temperature: float
        ) -> jax.Array:
            settings = {"audio_pad": SPECIAL.audio_pad, "temperature": temperature}
            return compute_log_probs(self.spec, weights, prompts, heard, completions, **settings).log_probs

        return partial(jax.jit(run, static_argnames="temperature"), self.weights)


_PLAIN = {"use_grpo": False, "dtype": "float32", "remat_policy": "none"}


def load(folder: Path, **settings: object) -> Ours:
    """Read a folder, with further configuration keys beside those that its config.json gives."""
    model = spec_from_published(folder)
    config = Config.model_validate({**model.settings, **_PLAIN, **settings})
    mesh = create_mesh(config, jax.devices()[:1])
    return Ours(config, read_published(folder, thinker_table(thinker_spec(config)), mesh, jnp.dtype(jnp.float32)))


def random_audio(rng: np.random.Generator, bins: int, frames: Sequence[int]) -> AudioBatch:
    """Clips of random features, zero beyond their frames."""
    features = np.zeros((len(frames), bins, max(frames)), np.float32)
    for row, length in zip(features, frames, strict=True):
        row[:, :length] = rng.normal(size=(bins, length))
    return AudioBatch(features, np.asarray(frames, np.int32))


def random_prompts(rng: np.random.Generator, vocab: int, frames: Sequence[int]) -> list[list[int]]:
    """Token ids of different lengths around each clip's placeholders."""

    def text(most: int) -> list[int]:
        return rng.integers(20, vocab, size=rng.integers(1, most)).tolist()

    placeholders = [[SPECIAL.audio_pad] * int(count) for count in audio_token_count(np.asarray(frames))]
    return [[*text(5), SPECIAL.audio_start, *audio, SPECIAL.audio_end, *text(9)] for audio in placeholders]


def padded(prompts: Sequence[Sequence[int]]) -> PromptBatch:
    """Prompts padded on the right to a common length."""
    tokens = np.full((len(prompts), max(map(len, prompts))), SPECIAL.pad, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return PromptBatch(tokens, np.asarray([len(prompt) for prompt in prompts], np.int32))
