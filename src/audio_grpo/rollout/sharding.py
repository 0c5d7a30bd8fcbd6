"""Where the engine's state lies on the mesh."""

from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audio_grpo.model.decoder import KeysValues
from audio_grpo.parallel.activations import FEW_TOKENS
from audio_grpo.parallel.mesh import BATCH_AXES, batch_sharding, replicated
from audio_grpo.rollout.programs import DecodeState, Prompts, Slots


def state_sharding(mesh: Mesh) -> DecodeState:
    """Caches are split by sequence and by key/value head, hidden states as decoding has them.

    What the host reads is everywhere.
    """
    cache: Any = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None, "tensor", None))
    everywhere: Any = replicated(mesh)
    by_sequence: Any = batch_sharding(mesh)
    decoding: Any = NamedSharding(mesh, PartitionSpec(FEW_TOKENS["batch"], FEW_TOKENS["embed"]))
    caches = KeysValues(cache, cache)
    return DecodeState(
        Prompts(caches, everywhere, by_sequence),
        Slots(
            cache=caches,
            hidden=decoding,
            row=everywhere,
            key=everywhere,
            length=everywhere,
            limit=everywhere,
            active=everywhere,
            tokens=everywhere,
            log_probs=everywhere,
        ),
    )
