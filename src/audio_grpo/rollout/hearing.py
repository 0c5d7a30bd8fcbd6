"""Hears each clip once: the tower runs over clips that are not in the store."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt32

from audio_grpo.audio import audio_token_count
from audio_grpo.model.audio_tower import PREFIX
from audio_grpo.model.spec import ThinkerSpec, compute_dtype
from audio_grpo.model.table import Weights
from audio_grpo.model.thinker import hear
from audio_grpo.parallel.mesh import batch_sharding
from audio_grpo.parallel.processes import host_value
from audio_grpo.rollout.clip_store import ClipStore
from audio_grpo.rollout.fingerprint import fingerprints
from audio_grpo.types import AudioBatch


class Hearing:
    """The audio tower of one model on one mesh."""

    def __init__(self, spec: ThinkerSpec, mesh: Mesh, store: ClipStore | None = None) -> None:
        """`store` keeps what was heard; it serves one process."""
        self.clips = 0
        """That went through the tower since this was made."""
        self.program = jax.jit(partial(hear, spec), out_shardings=batch_sharding(mesh))
        """(weights, audio) → embeddings."""
        self._spec, self._mesh, self._store = spec, mesh, store
        self._tower: tuple[dict[str, Array], str] = ({}, "")
        """The weights that were fingerprinted last, and their fingerprint."""

    def __call__(self, weights: Weights, audio: AudioBatch) -> Float[Array, "B A D"]:
        """Audio embeddings of B clips."""
        if audio.features.shape[2] == 0:
            return jnp.zeros((audio.features.shape[0], 0, self._spec.decoder.width))
        frames = host_value(jnp.asarray(audio.frames))
        if self._store is None:
            self.clips += int((frames > 0).sum())
            return self.program(weights, audio)
        return self._with_store(self._store, weights, audio, frames)

    def _with_store(
        self, store: ClipStore, weights: Weights, audio: AudioBatch, frames: np.ndarray
    ) -> Float[Array, "B A D"]:
        keys = self._keys(weights, audio)
        kept = [store.get(key) if count else None for key, count in zip(keys, frames, strict=True)]
        unheard = np.asarray([values is None for values in kept]) & (frames > 0)
        chunks = -(-audio.features.shape[2] // self._spec.audio.chunk_frames)
        heard = np.zeros((len(frames), chunks * self._spec.audio.chunk_tokens, self._spec.decoder.width), self._dtype)
        if unheard.any():
            self.clips += int(unheard.sum())
            left = audio._replace(frames=np.where(unheard, frames, 0).astype(np.int32))
            heard = np.array(self.program(weights, left))
        for row, key, values, count, new in zip(heard, keys, kept, frames, unheard, strict=True):
            length = int(audio_token_count(count, self._spec.audio.chunk_frames))
            if values is not None:
                row[:length] = values.view(self._dtype)
            elif new:
                store.put(key, row[:length].copy())
        return jax.device_put(heard, batch_sharding(self._mesh))

    @property
    def _dtype(self) -> jnp.dtype:
        return compute_dtype(self._spec)

    def _keys(self, weights: Weights, audio: AudioBatch) -> list[str]:
        """A name for each clip's embeddings: it tells what was heard, and with which tower."""
        tower = self._tower_name(weights)
        return [f"{tower}-{row.tobytes().hex()}" for row in np.asarray(_clip_fingerprints(audio))]

    def _tower_name(self, weights: Weights) -> str:
        tower = {key: value for key, value in weights.items() if key.startswith(PREFIX)}
        known, name = self._tower
        # Frozen weights stay the same arrays.
        if known.keys() != tower.keys() or any(known[key] is not value for key, value in tower.items()):
            name = self._named(tower)
            self._tower = (tower, name)
        return name

    def _named(self, tower: Mapping[str, Array]) -> str:
        told = hashlib.sha256(repr((self._spec.audio, self._spec.dtype, self._spec.lora_scale)).encode())
        for key in sorted(tower):
            told.update(key.encode() + np.asarray(_weight_fingerprint(tower[key])).tobytes())
        return told.hexdigest()[:32]


_weight_fingerprint: Callable[[Array], UInt32[Array, "1 2"]] = jax.jit(lambda weight: fingerprints(weight[None]))


@jax.jit
def _clip_fingerprints(audio: AudioBatch) -> UInt32[Array, "B 2"]:
    real = jnp.arange(audio.features.shape[2]) < audio.frames[:, None, None]
    return fingerprints(audio.features, jnp.broadcast_to(real, audio.features.shape))
