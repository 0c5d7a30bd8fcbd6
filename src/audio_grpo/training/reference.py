"""The policy that a run departed from, which the KL keeps it near."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
from jaxtyping import Array

from audio_grpo.model.lora import are_fresh
from audio_grpo.training.session import Session


@dataclass(frozen=True, slots=True)
class Reference:
    """Copies of what learns, in a format and a place of their own; all else is shared with the run."""

    shared: dict[str, Array]
    own: dict[str, Array]
    """In the host's memory where it is offloaded. Empty where fresh adapters learn: without them it is the policy."""

    @property
    def weights(self) -> dict[str, Array]:
        """All weights, on the devices: what lies on the host is sent there for as long as the result is held."""
        return self.shared | {key: _placed(value, "device") for key, value in self.own.items()}


def take_reference(session: Session, weights: Mapping[str, Array]) -> Reference:
    """The reference from a run's starting weights, of which no array that learns is kept: updates write over them."""
    adapters = {key: weights[key] for key in session.adapters}
    off = bool(adapters) and are_fresh(adapters)
    kind = "pinned_host" if session.config.reference_offload else "device"
    return Reference(
        shared={key: value for key, value in weights.items() if key not in session.trainable},
        own={key: _placed(_copied(weights[key], session), kind) for key in session.trainable if not off},
    )


def _copied(value: Array, session: Session) -> Array:
    return value.copy() if value.dtype == session.reference_dtype else value.astype(session.reference_dtype)


def _placed(value: Array, kind: str) -> Array:
    return jax.device_put(value, value.sharding.with_memory_kind(kind))
