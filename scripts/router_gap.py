"""Prints how far a learner's log-probabilities are from the sampler's, without and with router replay.

    python scripts/router_gap.py [KEY=VALUE ...]

Weights are random, prompts are of random text. It is the table of docs/experts.md.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from audio_grpo.config import Config, initialize
from audio_grpo.grpo import Rollout, generate_offline_completions
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import Weights
from audio_grpo.model.table import initialize as initialize_weights
from audio_grpo.model.thinker import group_forward, output_head, thinker_table
from audio_grpo.rollout import OfflineEngine
from audio_grpo.types import AudioBatch, PromptBatch, Routes

PROMPTS = 8
SIZES = {
    "num_decoder_layers": 12,
    "emb_dim": 128,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "mlp_dim": 512,
    "moe_mlp_dim": 64,
    "num_experts_per_tok": 8,
    "encoder_layers_for_audio": 1,
    "num_generations": 4,
    "max_prefill_predict_length": 64,
    "max_target_length": 128,
    "weight_dtype": "float32",
}
EXPERTS = {"num_experts": 64, "router_replay": True}


class Gap(NamedTuple):
    """Of the sampled tokens, in nats."""

    mean: float
    largest: float


def sampled(config: Config, weights: Weights) -> tuple[PromptBatch, Rollout]:
    """Prompts of random text, and what the engine answers."""
    rng = np.random.default_rng(0)
    length = config.max_prefill_predict_length
    lengths = rng.integers(length // 2, length + 1, PROMPTS)
    tokens = rng.integers(0, 100_000, (PROMPTS, length))
    prompts = PromptBatch(tokens.astype(np.int32), lengths.astype(np.int32))
    silence = AudioBatch(jnp.zeros((PROMPTS, config.num_mel_bins_for_audio, 0)), jnp.zeros(PROMPTS, jnp.int32))
    engine = OfflineEngine(config, weights)
    return prompts, generate_offline_completions(engine, prompts, silence, list(map(str, range(PROMPTS))), seed=0)


def gap(config: Config, weights: Weights, prompts: PromptBatch, rollout: Rollout, routes: Routes | None) -> Gap:
    """How far the learner's log-probabilities are from those of the sampler."""
    spec = thinker_spec(config)

    @jax.jit
    def score(
        weights: Weights, prompts: PromptBatch, completions: Int[Array, "B G C"], routes: Routes | None
    ) -> Float[Array, "B G C"]:
        unused_pad = -1
        hidden = group_forward(spec, weights, prompts, rollout.heard, completions, unused_pad, routes).hidden

        head = output_head(weights).astype(hidden.dtype)

        def of_prompt(x: tuple[Array, Array]) -> Float[Array, "G C"]:
            logits = jnp.einsum("gcd,vd->gcv", x[0], head, preferred_element_type=jnp.float32)
            scores = jax.nn.log_softmax(logits / config.decode_sampling_temperature)
            return jnp.take_along_axis(scores, x[1][..., None], axis=-1)[..., 0]

        return jax.lax.map(of_prompt, (hidden, completions))

    scores = np.asarray(score(weights, prompts, rollout.tokens, routes))
    difference = np.abs(scores - rollout.log_probs)[rollout.mask]
    return Gap(float(difference.mean()), float(difference.max()))


def table(overrides: list[str]) -> None:
    """Print a line for each number format and kind of model."""
    print("| activations | model | router replay | mean difference | largest |")
    print("|---|---|---|---:|---:|")
    for dtype in ("float32", "bfloat16"):
        for name, changes in (("dense", {}), ("64 experts, 8 a token", EXPERTS)):
            keys = SIZES | changes | {"dtype": dtype}
            config = initialize(["base", *(f"{key}={value}" for key, value in keys.items()), *overrides])
            weights = initialize_weights(thinker_table(thinker_spec(config)), jax.random.key(0), jnp.float32)
            prompts, rollout = sampled(config, weights)
            for replayed, routes in {"no": None, **({"yes": rollout.routes} if changes else {})}.items():
                mean, largest = gap(config, weights, prompts, rollout, routes)
                print(f"| {dtype} | {name} | {replayed if changes else ''} | {mean:.1e} | {largest:.1e} |", flush=True)


if __name__ == "__main__":
    table(sys.argv[1:])
