"""What is promised of a v4-8: four chips of 32 GiB, of which programs may use 30.75."""

import pytest

from audio_grpo.config import initialize
from audio_grpo.plan import Planner, RunPlan
from audio_grpo.plan.cost import Buffer
from audio_grpo.training.memory import GIB

VOCABULARY, EXPERTS, WIDTH = 152064, 128, 2048


@pytest.fixture(scope="module")
def omni() -> RunPlan:
    """LoRA on Qwen3-Omni-30B-A3B: 8 prompts of 30 s a step, 8 completions each of 256 tokens."""
    config = initialize(
        [
            "grpo_audio_qwen3_omni",
            "lora_rank=16",
            "ici_fsdp_parallelism=1",
            "ici_expert_parallelism=4",
            "gradient_accumulation_steps=1",
        ]
    )
    return Planner("v4-8", config).plan()


def buffers_of(plan: RunPlan) -> list[tuple[str, Buffer]]:
    return [(p.phase, buffer) for p in plan.programs if p.cost is not None for buffer in p.cost.buffers]


def test_lora_on_the_30b_model_takes_at_most_24_gib_a_chip(omni: RunPlan) -> None:
    assert omni.work.prompts == 8 and omni.work.generations == 8 and omni.work.completion_length == 256
    assert omni.work.frames == 3000
    assert {program.phase for program in omni.programs} == {
        "tower",
        "prefill",
        "decode burst",
        "scoring",
        "gradients",
        "update",
    }
    for program in omni.programs:
        assert program.total <= 24 * GIB, f"{program.phase}: {program.total / GIB:.2f} GiB"
    assert omni.fits


def test_no_array_spans_the_vocabulary(omni: RunPlan) -> None:
    assert not [(phase, x) for phase, x in buffers_of(omni) if VOCABULARY in x.dims]


def test_no_array_holds_a_token_once_for_every_expert(omni: RunPlan) -> None:
    """Routed rows are tokens × 8, taken in parts; an array with all 128 experts and the width would be such a copy."""
    tokens = omni.work.prompts * (omni.work.prompt_length + 8 * omni.work.completion_length)
    for phase, buffer in buffers_of(omni):
        if len(buffer.dims) < 2:
            continue
        first, *middle, last = buffer.dims
        copies = first in (EXPERTS, EXPERTS // 4) and last in (WIDTH, 768) and not {WIDTH, 768} & set(middle)
        assert not copies, (phase, buffer)
        assert buffer.dims[0] < tokens * 8 / 4, (phase, buffer)


def test_prompts_are_not_repeated_for_their_completions(omni: RunPlan) -> None:
    """Two prompts a chip, eight completions each: nothing of the prompt's length has sixteen rows, folded or not."""
    length = omni.work.prompt_length
    repeated = [
        (phase, x)
        for phase, x in buffers_of(omni)
        if phase in ("decode burst", "scoring", "gradients")
        and ((length in x.dims and 16 in x.dims) or 16 * length in x.dims)
    ]
    assert not repeated


def test_the_decode_burst_is_the_only_loop_of_open_length(omni: RunPlan) -> None:
    loops = {program.phase: program.cost.guessed_loops for program in omni.programs if program.cost}
    assert {phase: len(found) for phase, found in loops.items() if found} == {"decode burst": 1}


def test_the_test_recipe_fits() -> None:
    plan = Planner("v4-8", initialize(["grpo_audio_qwen3_omni_test", "grain_train_files=data"])).plan()
    assert plan.fits and len(plan.programs) == 6
    assert plan.peak.total < GIB
