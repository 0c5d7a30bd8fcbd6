from types import SimpleNamespace

import jax
import pytest

from audio_grpo.errors import UserError
from audio_grpo.parallel.roles import create_roles
from small_model import small_config


def roles(per_replica, replicas=1, **changes):
    return create_roles(small_config(inference_devices_per_replica=per_replica, inference_replicas=replicas, **changes))


def sizes(mesh):
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


@pytest.mark.parametrize(("per_replica", "replicas"), [(None, 1), (4, 1), (2, 2), (8, 1), (3, 2)])
def test_all_devices_do_both_unless_fewer_are_to_sample(per_replica, replicas):
    learners, samplers = roles(per_replica, replicas)
    assert samplers is None
    assert sizes(learners) == {"fsdp": 4}


@pytest.mark.parametrize(
    ("per_replica", "replicas", "experts", "expected"),
    [
        (1, 1, 0, {}),
        (2, 1, 0, {"fsdp": 2}),
        (2, 1, 4, {"expert": 2}),
        (3, 1, 4, {"fsdp": 3}),
        (1, 2, 4, {"data": 2}),
        (1, 3, 0, {"data": 3}),
    ],
)
def test_the_last_devices_sample_and_the_others_learn(per_replica, replicas, experts, expected):
    learners, samplers = roles(per_replica, replicas, num_experts=experts)
    count = per_replica * replicas
    assert samplers.devices.flatten().tolist() == jax.devices()[-count:]
    assert learners.devices.flatten().tolist() == jax.devices()[:-count]
    assert sizes(samplers) == expected
    assert sizes(learners) == ({"fsdp": 4 - count} if count < 3 else {})


def test_replicas_without_their_size_are_refused():
    with pytest.raises(ValueError, match="inference_replicas 2 needs inference_devices_per_replica"):
        roles(None, 2)


def test_sizes_that_do_not_fit_the_devices_that_learn_are_refused():
    with pytest.raises(
        UserError, match=r"inference_devices_per_replica 1 x .* 3 of 4 devices learn.* make the product 3"
    ):
        roles(1, ici_fsdp_parallelism=4)


def chips(places, processes=1):
    return [
        SimpleNamespace(platform="tpu", coords=place, process_index=i * processes // len(places))
        for i, place in enumerate(places)
    ]


def test_several_processes_are_refused():
    config = small_config(inference_devices_per_replica=2)
    square = chips([(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)], processes=2)
    with pytest.raises(UserError, match=r"They belong to 2 processes.* set inference_devices_per_replica to null"):
        create_roles(config, square)


def test_chips_that_form_no_block_are_refused():
    config = small_config(inference_devices_per_replica=1)
    with pytest.raises(UserError, match="The 3 TPU chips that learn do not form a rectangular block"):
        create_roles(config, chips([(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]))
