import pytest

from audio_grpo.plan.chips import TPU_CHIPS, Chip
from audio_grpo.plan.cost import ProgramCost
from audio_grpo.plan.roofline import roofline

CHIP = Chip("round", memory=1, flops=100.0, bandwidth=10.0, link_bandwidth=1.0, links=4)


def cost(flops=0.0, memory_traffic=0, **collectives):
    return ProgramCost(0, 0, 0, 0, 0, flops, memory_traffic, collectives, (), ())


@pytest.mark.parametrize(
    ("given", "seconds", "bound"),
    [
        (cost(flops=500.0, memory_traffic=40, gather=2), 5.0, "compute"),
        (cost(flops=500.0, memory_traffic=70, gather=2), 7.0, "memory"),
        (cost(flops=500.0, memory_traffic=70, gather=10, reduce=12), 11.0, "interconnect"),
    ],
)
def test_the_busiest_part_sets_the_time(given, seconds, bound):
    found = roofline(given, CHIP)
    assert (found.seconds, found.bound) == (seconds, bound)


def test_reading_all_weights_of_a_v4_chip_takes_what_its_memory_allows():
    chip = TPU_CHIPS["v4"]
    assert roofline(cost(memory_traffic=chip.memory), chip).seconds == pytest.approx(0.0269, rel=1e-2)
