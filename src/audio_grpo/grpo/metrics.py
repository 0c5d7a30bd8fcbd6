"""What a loss reports besides its value."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Average(NamedTuple):
    """A mean over tokens or sequences."""

    total: Float[Array, ""]
    number: Float[Array, ""]

    def merge(self, other: "Average") -> "Average":
        """That of two parts together."""
        return Average(self.total + other.total, self.number + other.number)

    def value(self) -> float:
        """0 of nothing."""
        return float(self.total) / max(float(self.number), 1.0)


class Least(NamedTuple):
    """A minimum over tokens or sequences."""

    amount: Float[Array, ""]
    """∞ of nothing."""

    def merge(self, other: "Least") -> "Least":
        """That of two parts together."""
        return Least(jnp.minimum(self.amount, other.amount))

    def value(self) -> float:
        """0 of nothing."""
        return _zero_of_nothing(self.amount)


class Largest(NamedTuple):
    """A maximum over tokens or sequences."""

    amount: Float[Array, ""]
    """−∞ of nothing."""

    def merge(self, other: "Largest") -> "Largest":
        """That of two parts together."""
        return Largest(jnp.maximum(self.amount, other.amount))

    def value(self) -> float:
        """0 of nothing."""
        return _zero_of_nothing(self.amount)


class Total(NamedTuple):
    """A sum that the parts of a batch add to."""

    amount: Float[Array, ""]

    def merge(self, other: "Total") -> "Total":
        """That of two parts together."""
        return Total(self.amount + other.amount)

    def value(self) -> float:
        """As it is."""
        return float(self.amount)


class LargestLoad(NamedTuple):
    """Tokens of the busiest expert by those of an even share, in the layer where that is most."""

    assigned: Float[Array, "L E"]
    """Tokens that went to each expert."""

    def merge(self, other: "LargestLoad") -> "LargestLoad":
        """That of two parts together."""
        return LargestLoad(self.assigned + other.assigned)

    def value(self) -> float:
        """1 where all experts have the same, E / k where all tokens go to the same k; 0 of nothing."""
        even = jnp.maximum(self.assigned.mean(axis=1), 1e-9)
        return float((self.assigned.max(axis=1) / even).max())


class UnusedExperts(NamedTuple):
    """Share of the experts of all layers to which no token went."""

    assigned: Float[Array, "L E"]

    def merge(self, other: "UnusedExperts") -> "UnusedExperts":
        """That of two parts together."""
        return UnusedExperts(self.assigned + other.assigned)

    def value(self) -> float:
        """Between 0 and 1."""
        return float((self.assigned == 0).mean())


Metric = Average | Least | Largest | Total | LargestLoad | UnusedExperts


class LossAux(NamedTuple):
    """A loss and what is reported of it; two parts' reports can be merged."""

    loss: Float[Array, ""]
    metrics: dict[str, Metric]
    """By TRL's names where it has one, e.g. "clip_ratio/low_mean"."""

    def merge(self, other: "LossAux") -> "LossAux":
        """The report on two parts together."""
        others: dict[str, Any] = other.metrics
        merged = {name: metric.merge(others[name]) for name, metric in self.metrics.items()}
        return LossAux(self.loss + other.loss, merged)

    def means(self) -> dict[str, float]:
        """Every metric's value."""
        return {"loss": float(self.loss)} | {name: metric.value() for name, metric in self.metrics.items()}


def average(values: Array, mask: Bool[Array, "B G C"]) -> Average:
    """Over the tokens of [B, G, C], or over those sequences of [B, G, 1] that have tokens."""
    where = _counted(values, mask)
    return Average(jnp.where(where, values, 0).sum().astype(jnp.float32), where.sum().astype(jnp.float32))


def least(values: Float[Array, "B G #C"], mask: Bool[Array, "B G C"]) -> Least:
    """Likewise."""
    return Least(jnp.where(_counted(values, mask), values, jnp.inf).min())


def largest(values: Float[Array, "B G #C"], mask: Bool[Array, "B G C"]) -> Largest:
    """Likewise."""
    return Largest(jnp.where(_counted(values, mask), values, -jnp.inf).max())


def _counted(values: Array, mask: Bool[Array, "B G C"]) -> Bool[Array, "B G #C"]:
    return mask if values.shape == mask.shape else mask.any(axis=-1, keepdims=True)


def _zero_of_nothing(amount: Float[Array, ""]) -> float:
    return 0.0 if math.isinf(amount) else float(amount)
