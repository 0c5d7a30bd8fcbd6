"""Where the engine's state lies on the mesh."""

from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audio_grpo.model.decoder import KeysValues
from audio_grpo.model.spec import DecoderSpec
from audio_grpo.parallel.mesh import BATCH_AXES, batch_sharding, replicated
from audio_grpo.rollout.programs import DecodeState, Prompts, Slots


def state_sharding(mesh: Mesh, spec: DecoderSpec) -> DecodeState:
    """Caches and hidden states are split by sequence and by key/value head; what the host reads is everywhere."""
    heads = "tensor" if spec.kv_heads % mesh.shape["tensor"] == 0 else None
    cache: Any = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None, heads, None))
    everywhere: Any = replicated(mesh)
    by_sequence: Any = batch_sharding(mesh)
    caches = KeysValues(cache, cache)
    return DecodeState(
        Prompts(caches, everywhere, by_sequence),
        Slots(
            cache=caches,
            hidden=by_sequence,
            row=everywhere,
            key=everywhere,
            length=everywhere,
            limit=everywhere,
            active=everywhere,
            tokens=everywhere,
            log_probs=everywhere,
        ),
    )
