"""The least time a program can take on a chip."""

from dataclasses import dataclass

from audio_grpo.plan.chips import Chip
from audio_grpo.plan.cost import ProgramCost


@dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a chip is busy with a program.

    Attributes:
        compute: the matrix units, at their peak.
        memory: the chip's memory, at its full rate.
        interconnect: the links of a ring, both directions at once.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """Time of the busiest part, as if the others hid behind it entirely: a bound from below."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound(self) -> str:
        """The busiest part."""
        parts = {"compute": self.compute, "memory": self.memory, "interconnect": self.interconnect}
        return max(parts, key=lambda part: parts[part])


def roofline(cost: ProgramCost, chip: Chip) -> Roofline:
    """Time of a program whose cost is known.

    A collective over one mesh axis is a ring: a chip sends to a neighbour on either side, whatever number of links it
    has. Latencies and the overlap that a program misses are left out.
    """
    ring = min(2, chip.links) * chip.link_bandwidth
    return Roofline(cost.flops / chip.flops, cost.memory_traffic / chip.bandwidth, cost.sent / ring)
