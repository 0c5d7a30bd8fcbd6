"""A decode step beside the least that it could cost: every weight and every cached key and value read once."""

import math
from dataclasses import dataclass

import jax

from audio_grpo.model.audio_tower import PREFIX
from audio_grpo.plan.cost import ProgramCost
from audio_grpo.rollout.state import DecodeState
from audio_grpo.training.memory import bytes_per_device
from audio_grpo.training.programs import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """One step of a burst."""

    tokens: int
    """Of all slots, on all chips."""
    bytes: float
    """That a chip's memory moves."""
    least_bytes: int
    """Of the chip's share of weights, caches and slots."""
    flops: float
    """Of each token, on all chips."""
    least_flops: float
    """Two for each weight that a token meets, attention left out."""


def decode_step(program: Program, cost: ProgramCost) -> DecodeStep:
    """Figures of a decode burst, whose arguments are those of `EnginePrograms.burst`."""
    _, weights, _, state, _ = program.arguments
    met = {key: value for key, value in weights.items() if _is_met(key, weights)}
    tokens = _slots(state)
    decoder = program.session.spec.decoder
    share = decoder.experts_per_token / max(1, decoder.experts)
    products = sum(math.prod(value.shape) * (share if ".experts." in key else 1) for key, value in met.items())
    return DecodeStep(
        tokens=tokens,
        bytes=cost.memory_traffic / program.turns,
        least_bytes=bytes_per_device((met, state.prompts.cache, state.slots.cache)),
        flops=cost.flops * program.session.mesh.size / program.turns / tokens,
        least_flops=2 * products,
    )


def _is_met(key: str, weights: dict[str, jax.ShapeDtypeStruct]) -> bool:
    """The tower does not take part, and of an embedding that is not the head too, single rows are read."""
    if key.startswith(PREFIX):
        return False
    return key != "model.embed_tokens.weight" or "lm_head.weight" not in weights


def _slots(state: DecodeState) -> int:
    return state.slots.active.shape[0]
