"""Where the engine's state lies on the mesh."""

from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audio_grpo.model.decoder import KeysValues
from audio_grpo.parallel.activations import FEW_TOKENS
from audio_grpo.parallel.mesh import BATCH_AXES, batch_sharding, replicated
from audio_grpo.rollout.state import DecodeState, Outputs, Prompts, Report, Slots, Work
from audio_grpo.types import Routes


def state_sharding(mesh: Mesh, *, router_replay: bool) -> DecodeState:
    """Caches are split by sequence and by key/value head, hidden states as decoding has them.

    What the host reads is everywhere.
    """
    cache: Any = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "tensor", None, None))
    everywhere: Any = replicated(mesh)
    by_sequence: Any = batch_sharding(mesh)
    decoding: Any = NamedSharding(mesh, PartitionSpec(FEW_TOKENS["batch"], FEW_TOKENS["embed"]))
    caches = KeysValues(cache, cache)
    return DecodeState(
        Prompts(caches, everywhere, by_sequence, everywhere, everywhere),
        _outputs_sharding(mesh, router_replay),
        Slots(caches, decoding, everywhere, everywhere, everywhere, everywhere, everywhere),
        everywhere,
        everywhere,
        Work(everywhere, everywhere),
    )


def report_sharding(mesh: Mesh, *, router_replay: bool) -> Report:
    """Every process reads all of it."""
    everywhere: Any = replicated(mesh)
    return Report(_outputs_sharding(mesh, router_replay), Work(everywhere, everywhere), everywhere)


def _outputs_sharding(mesh: Mesh, router_replay: bool) -> Outputs:
    everywhere: Any = replicated(mesh)
    routes = Routes(everywhere, everywhere) if router_replay else None
    return Outputs(everywhere, everywhere, everywhere, everywhere, everywhere, everywhere, routes)
