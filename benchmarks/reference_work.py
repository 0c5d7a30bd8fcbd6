"""The reference work of the benchmarks: a random thinker with the true vocabulary, prompts of true proportions."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int, Int32

FAMILY = "qwen3_omni"
VOCAB = 152064
SIZES = {
    "decoder_block": FAMILY,
    "num_decoder_layers": 2,
    "emb_dim": 256,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_mlp_dim": 256,
    "vocab_size": VOCAB,
    "d_model_for_audio": 256,
    "encoder_layers_for_audio": 2,
    "encoder_attention_heads_for_audio": 4,
    "encoder_ffn_dim_for_audio": 1024,
    "downsample_hidden_size_for_audio": 480,
    "dtype": "float32",
    "weight_dtype": "float32",
    "jax_cache_dir": "",
}
TEMPERATURE = 0.9
MEAN_LENGTH = 32
"""Of skewed completions, before they are cut at the work's tokens."""

Lengths = Literal["equal", "limits", "stops"]


@dataclass(frozen=True, slots=True)
class Work:
    """One workload of rollouts; every array of it follows from its sizes."""

    prompts: int = 8
    generations: int = 8
    tokens: int = 64
    """New tokens of the longest completion."""
    seconds: float = 5.0
    """Of each clip."""
    text_tokens: int = 64
    """Of the prompt beside its clip."""
    lengths: Lengths = "equal"
    """All of `tokens`; or geometric, by a limit for each prompt or by stop tokens that come by chance."""
    slots: int = 64
    """Completions that ours may decode together."""

    @property
    def audio_tokens(self) -> int:
        """Placeholders of a clip: 13 a second."""
        return round(13 * self.seconds)

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt, e.g. 129."""
        return self.audio_tokens + self.text_tokens

    @property
    def as_text(self) -> "Work":
        """The same with prompts of as many tokens, all of text: nothing is heard."""
        return replace(self, seconds=0.0, text_tokens=self.prompt_tokens)

    @property
    def completions(self) -> int:
        """Of the whole work."""
        return self.prompts * self.generations

    @property
    def limits(self) -> list[int]:
        """Tokens that the completions of each prompt may have."""
        if self.lengths != "limits":
            return [self.tokens] * self.prompts
        drawn = np.random.default_rng(1).geometric(1 / MEAN_LENGTH, self.prompts)
        return np.minimum(drawn, self.tokens).tolist()

    @property
    def stop(self) -> tuple[int, ...]:
        """Tokens that end a completion: none, or as many as a random model draws one of in `MEAN_LENGTH` tokens."""
        return tuple(range(VOCAB // MEAN_LENGTH)) if self.lengths == "stops" else ()


def requests(work: Work, audio_pad: int, seed: int = 0) -> list[Any]:
    """The work's prompts as the engine takes them."""
    from audio_grpo.types import InputData

    rng = np.random.default_rng(seed)
    inputs = []
    for i in range(work.prompts):
        text = rng.integers(1000, 100_000, work.text_tokens)
        half = work.text_tokens // 2
        tokens = np.concatenate([text[:half], np.full(work.audio_tokens, audio_pad), text[half:]]).astype(np.int32)
        features = rng.normal(size=(128, round(100 * work.seconds))).astype(np.float32)
        inputs.append(InputData(id=str(i), tokens=tokens, true_length=len(tokens), audio_features=features))
    return inputs


def answers(work: Work) -> tuple[Int32[np.ndarray, "B G C"], Float32[np.ndarray, "B G"]]:
    """Completion tokens and advantages that both sides learn from, so that their gradients agree."""
    rng = np.random.default_rng(2)
    shape = (work.prompts, work.generations)
    tokens = rng.integers(1000, 100_000, (*shape, work.tokens)).astype(np.int32)
    return tokens, rng.normal(size=shape).astype(np.float32)


def rewards(tokens: Int[np.ndarray, "*B C"]) -> Float[np.ndarray, "*B"]:
    """Share of even tokens in each completion: costs nothing, and hardly two of a group have the same."""
    return (tokens % 2 == 0).mean(axis=-1)


def wanted_tokens(sampled: Int[np.ndarray, "B*G C"], work: Work) -> int:
    """Tokens up to each completion's limit and first stop token, that one included."""
    stops = np.isin(sampled, work.stop)
    stopped_before = np.cumsum(stops, axis=1) - stops
    within = np.arange(sampled.shape[1]) < np.repeat(work.limits, work.generations)[:, None]
    return int(((stopped_before == 0) & within).sum())
