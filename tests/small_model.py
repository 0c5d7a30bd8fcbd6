"""A model small enough to compile in seconds, its prompts and its weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from audio_grpo.audio import audio_token_count
from audio_grpo.config import Config
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import initialize
from audio_grpo.model.thinker import thinker_table
from audio_grpo.types import InputData, SpecialTokens

AUDIO_PAD = 5
SPECIAL = SpecialTokens(
    audio_pad=AUDIO_PAD,
    audio_start=3,
    audio_end=4,
    im_start=1,
    im_end=2,
    pad=0,
    stop=(2,),
    never_sampled=((0, 2), (3, 6)),
)
"""Roles in a vocabulary of 256 made-up tokens."""

SMALL = {
    "num_decoder_layers": 2,
    "emb_dim": 32,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 48,
    "vocab_size": 256,
    "num_experts_per_tok": 2,
    "moe_mlp_dim": 24,
    "d_model_for_audio": 16,
    "encoder_attention_heads_for_audio": 2,
    "downsample_hidden_size_for_audio": 4,
    "max_prefill_predict_length": 40,
    "max_target_length": 52,
    "num_generations": 3,
    "max_slots": 8,
    "decode_burst": 4,
    "jax_cache_dir": "",
}


def small_config(**changes: object) -> Config:
    return Config.model_validate(SMALL | changes)


def random_weights(config: Config, seed: int = 0) -> dict[str, jax.Array]:
    """Weights of which none is silent: the default initialisation has zeros and ones that hide mistakes."""
    draw = jax.jit(partial(initialize, thinker_table(thinker_spec(config)), dtype=jnp.float32))
    weights, noise = draw(jax.random.key(seed)), np.random.default_rng(seed)

    def loud(key: str, value: jax.Array) -> np.ndarray:
        if value.ndim > 2:
            return np.asarray(value)
        scale = 20 if "embed_tokens" in key else 1
        return (scale * np.asarray(value) + 0.1 * noise.normal(size=value.shape)).astype(np.float32)

    return {key: jnp.asarray(loud(key, value)) for key, value in weights.items()}


def request_of(name: str, frames: int, seed: int = 0, text: int = 3) -> InputData:
    """A prompt around `frames` frames of noise, with `text` tokens after the clip."""
    rng = np.random.default_rng(seed)
    placeholders = [AUDIO_PAD] * int(audio_token_count(frames))
    tokens = np.asarray([1, 7, 3, *placeholders, 4, *rng.integers(6, 200, text)], np.int32)
    features = rng.normal(size=(128, frames)).astype(np.float32)
    return InputData(id=name, tokens=tokens, true_length=len(tokens), audio_features=features)
