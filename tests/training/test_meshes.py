"""However eight devices are split, they sample and learn what one device does."""

import pytest
from grpo_steps import assert_alike, grpo_runs
from tiny_runs import with_tones

pytestmark = pytest.mark.slow

STEPS = 5
RUN = {"steps": STEPS, "enable_checkpointing": False, "log_completions": 0}
MODELS = {
    "experts": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_mlp_dim": 24,
        "freeze_audio_encoder_params": False,
        "logits_via_embedding": False,
    },
    "adapters": {"lora_rank": 4, "lora_alpha": 8.0, "lora_target_modules": ["model.layers.*_proj"], "grpo_beta": 0.0},
}
SPLITS = {
    "experts": [
        {"data": 8},
        {"fsdp": 8},
        {"fsdp": 2, "expert": 4},
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
    "adapters": [{"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}],
}


def keys_of(split):
    return {f"ici_{axis}_parallelism": split.get(axis, 1) for axis in ("data", "fsdp", "expert", "tensor")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_tones(tmp_path_factory.mktemp("meshes"))


@pytest.fixture(scope="module", params=MODELS)
def runs(folder, request):
    """A model's steps on one device, and what is known of its runs on eight."""
    name, changes = request.param, RUN | MODELS[request.param]
    alone = grpo_runs(folder, {name: changes | {"per_device_batch_size": 8}}, devices=1)[0]
    split = {f"{name} over {sizes}": changes | keys_of(sizes) for sizes in SPLITS[name]}
    together = grpo_runs(folder, split, devices=8)[0]
    assert len(together.steps) == len(split)
    return alone.steps[name], together


def test_there_is_something_to_agree_on(runs):
    alone, _ = runs
    assert len(alone) == STEPS
    assert all(step.metrics["grad_norm"] > 0.01 and step.metrics["reward_std"] > 0 for step in alone)
    assert len({str(step.tokens) for step in alone}) == STEPS


def test_every_split_samples_and_learns_what_one_device_does(runs):
    alone, split = runs
    for steps in split.steps.values():
        assert_alike(steps, alone)


def test_no_array_is_gathered_whole_for_want_of_a_layout(runs):
    """XLA warns where it can bring an array from one layout to another only by repeating it on every device."""
    _, split = runs
    assert f"grpo {STEPS}/{STEPS}" in split.errors
    assert "rematerialization" not in split.errors
