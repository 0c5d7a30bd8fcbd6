import dataclasses
import json
import math
from xml.etree import ElementTree

import jax
import pytest

from audio_grpo.config import Config, initialize
from audio_grpo.errors import UserError
from audio_grpo.model.decoder import decoder_table
from audio_grpo.model.spec import thinker_spec
from audio_grpo.plan import Planner, RunPlan, limits, plan_chart, plan_json, plan_text, remedies
from audio_grpo.plan.run_plan import _refused_size
from audio_grpo.training.memory import GIB
from small_model import SMALL

SIZES = SMALL | {
    "num_experts": 4,
    "moe_mlp_dim": 128,
    "emb_dim": 128,
    "output_dim_for_audio": 128,
    "audio_max_seconds": 3,
    "vocab_size": 1024,
}
KEYS = [f"{key}={value}" for key, value in SIZES.items() if value != ""]
PHASES = ["tower", "prefill", "decode burst", "scoring", "gradients", "update"]


def config_of(*changes: str):
    return initialize(["tiny", *KEYS, *changes])


@pytest.fixture(scope="module")
def local() -> tuple[Planner, RunPlan]:
    planner = Planner(None, config_of("ici_fsdp_parallelism=2", "ici_expert_parallelism=2"))
    return planner, planner.plan()


def with_memory(plan: RunPlan, memory: float) -> RunPlan:
    return dataclasses.replace(plan, chip=dataclasses.replace(plan.chip, memory=int(memory)))


def test_every_program_of_a_step_is_planned_on_this_machines_devices(local):
    _, plan = local
    assert [program.phase for program in plan.programs] == PHASES
    assert plan.mesh == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1} and plan.chips == 4
    assert plan.fits and math.isfinite(plan.step_seconds) and plan.tokens_per_second > 0
    for program in plan.programs:
        assert program.cost is not None and program.roofline is not None
        assert program.total == program.held + program.made
        assert program.held >= sum(plan.kept.values())


@pytest.mark.slow
def test_a_tpu_slice_is_planned_without_a_tpu():
    plan = Planner("v5e-4", config_of("ici_fsdp_parallelism=1", "ici_expert_parallelism=4")).plan()
    assert plan.topology == "v5e-4" and plan.chip.name == "v5e" and plan.fits
    burst = next(program for program in plan.programs if program.phase == "decode burst")
    assert burst.cost is not None and len(burst.cost.guessed_loops) == 1
    # Tokens travel to their experts and back.
    assert burst.cost.sent > 0


@pytest.mark.slow
def test_the_largest_batch_is_the_one_whose_compilation_fills_the_memory(local):
    planner, plan = local
    batch = planner.config.per_device_batch_size
    larger = Config.model_validate(planner.config.model_dump() | {"per_device_batch_size": 6 * batch})
    full = with_memory(plan, planner.plan(larger, phases=["gradients"]).peak.total)
    found = {limit.key: limit for limit in limits(planner, planner.config, full)}
    assert found["per_device_batch_size"].largest == pytest.approx(6 * batch, rel=0.1)
    assert found["max_slots"].largest > found["max_slots"].now == planner.config.max_slots
    assert found["audio_max_seconds"].largest > found["audio_max_seconds"].now == 3


def test_what_does_not_fit_says_what_would(local):
    planner, plan = local
    tight = with_memory(plan, 0.6 * plan.peak.total)
    assert not tight.fits
    told = "\n".join(remedies(planner.config, tight))
    assert f"{plan.peak.phase} needs" in told
    for change in ("grpo_beta=0", "reference_offload=true", "lora_rank=16", "mu_dtype=bfloat16 nu_dtype=bfloat16"):
        assert change in told
    assert not list(remedies(planner.config, plan))


def test_a_slice_that_holds_it_is_named():
    planner = Planner("v5e-1", config_of())
    plan = planner.plan(phases=["update"])
    kept = dataclasses.replace(plan, kept=dict.fromkeys(plan.kept, 30 * GIB))
    told = "\n".join(remedies(planner.config, with_memory(kept, 15 * GIB)))
    assert told == "", "what the compiler counted fits"
    (program,) = plan.programs
    large = dataclasses.replace(kept, programs=(dataclasses.replace(program, held=90 * GIB),))
    # 90 GiB over chips of 15.75, a fifth of each left free: eight.
    assert "v5e-8 is the smallest slice" in "\n".join(remedies(planner.config, large))


@pytest.mark.slow
def test_a_device_that_samples_ahead_holds_both_sides_at_once():
    def plan(**changes):
        planner = Planner(None, Config.model_validate(config_of().model_dump() | changes))
        planner._devices = jax.devices()[:1]
        return planner.plan(phases=["gradients", "decode burst"])

    by_turns = plan()
    ahead = plan(sample_ahead=True, importance_sampling_correction=True, enable_checkpointing=False)
    held = {side: {x.phase: x.held for x in of.programs} for side, of in (("turns", by_turns), ("ahead", ahead))}
    copy = ahead.kept["weights"] - by_turns.kept["weights"]
    assert copy > 0
    assert held["ahead"]["decode burst"] == held["turns"]["decode burst"] + copy
    assert held["ahead"]["gradients"] > held["turns"]["gradients"] + copy


def test_the_plan_is_told_as_text_json_and_picture(local):
    _, plan = local
    text = plan_text(plan, [], ["do this"])
    assert all(f"| {phase} |" in text for phase in PHASES)
    assert text.endswith("fits\ndo this")
    told = json.loads(json.dumps(plan_json(plan, [], [])))
    assert told["fits"] and [program["phase"] for program in told["programs"]] == PHASES
    assert told["programs"][0]["arguments"] == plan.programs[0].cost.arguments
    root = ElementTree.fromstring(plan_chart(plan))
    words = "".join(root.itertext())
    assert all(phase in words for phase in PHASES)


def test_a_refused_program_is_told_not_hidden(local):
    _, plan = local
    refused = dataclasses.replace(plan.programs[4], held=0, made=99 * GIB, cost=None, roofline=None)
    broken = dataclasses.replace(plan, programs=(*plan.programs[:4], refused))
    assert not broken.fits and math.isnan(broken.step_seconds)
    assert "refused by the compiler" in plan_text(broken, [], [])
    assert plan_json(broken, [], [])["step_seconds"] is None
    assert "refused" in plan_chart(broken) and "nan" not in plan_chart(broken)


def test_a_run_that_samples_nothing_is_not_planned():
    with pytest.raises(UserError, match="use_grpo is false"):
        Planner(None, config_of("use_grpo=false"))


def test_both_sentences_of_the_compiler_tell_the_size_of_what_it_refuses():
    whole = Exception("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.50G of 15.75G hbm. Exceeded")
    parts = Exception("the total memory required for HLO temporaries (28.50G) exceeds available HBM (15.75G).")
    assert _refused_size(whole) == int(40.5 * GIB)
    assert _refused_size(parts) == int(28.5 * GIB)
    with pytest.raises(ValueError, match="something else"):
        _refused_size(ValueError("something else"))


def test_a_decode_step_is_told_beside_the_least_it_could_cost(local):
    _, plan = local
    (step,) = [program.decoding for program in plan.programs if program.decoding]
    config, shape = config_of(), plan.work.shape
    table = decoder_table(thinker_spec(config).decoder)
    assert "lm_head.weight" not in table  # the embedding is read whole, as the head
    sizes = {key: math.prod(weight.shape) for key, weight in table.items()}
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    assert step.least_flops == 2 * (sum(sizes.values()) - experts + experts * config.num_experts_per_tok / 4)
    positions = shape.rows * plan.work.prompt_length + shape.slots * plan.work.completion_length
    cached = 2 * config.num_decoder_layers * config.num_kv_heads * config.head_dim * positions
    repeated = sum(size for key, size in sizes.items() if "norm" in key)
    # Float32 on four devices, each with a quarter of everything but the norms.
    assert step.least_bytes == sum(sizes.values()) + cached + 3 * repeated
    assert step.tokens == shape.slots
    assert step.flops > step.least_flops and step.bytes > step.least_bytes
    assert f"a decode step of {shape.slots} tokens" in plan_text(plan, [], [])
