"""What a decode step's largest matrix products cost on this machine, alone and with their memory already there."""

import time
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from audio_grpo.model.spec import DecoderSpec

_REPEATS = 10
_RUNS = 5


def decode_matmuls(decoder: DecoderSpec, rows: int) -> dict[str, Any]:
    """Seconds of each product of a decode step of `rows` tokens, all layers together.

    Experts are taken as evenly chosen: each has its share of the rows.
    """
    width, heads = decoder.width, (decoder.heads + 2 * decoder.kv_heads) * decoder.head_width
    share = -(-rows * decoder.experts_per_token // decoder.experts)
    once = {
        "queries, keys, values": _seconds((1, rows, width), heads),
        "attention output": _seconds((1, rows, decoder.heads * decoder.head_width), width),
        "experts, gate and up": _seconds((decoder.experts, share, width), 2 * decoder.expert_width),
        "experts, down": _seconds((decoder.experts, share, decoder.expert_width), width),
    }
    layers = {name: decoder.layers * seconds for name, seconds in once.items()}
    return {"logits": _seconds((1, rows, width), decoder.vocab), **layers}


def _seconds(left: tuple[int, int, int], columns: int) -> float:
    """Median over runs of one batched product [E, n, D] x [E, m, D] → [E, n, m]."""

    @jax.jit
    def repeated(x: Float[Array, "E n D"], y: Float[Array, "E m D"]) -> Float[Array, "E n D"]:
        # Each product needs the one before it, so that none is left out; results take up the same memory. Without the
        # barrier the compiler might make the one column only.
        def again(_: int, x: Float[Array, "E n D"]) -> Float[Array, "E n D"]:
            return x + lax.optimization_barrier(jnp.einsum("end,emd->enm", x, y))[..., :1]

        return lax.fori_loop(0, _REPEATS, again, x)

    x, y = jnp.ones(left), jnp.zeros((left[0], columns, left[2]))
    repeated(x, y).block_until_ready()
    seconds = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        repeated(x, y).block_until_ready()
        seconds.append((time.perf_counter() - started) / _REPEATS)
    return median(seconds)
