"""Prints what a decode step moves beside the least it could, on TPUs that are not there: a table of docs/rollout.md."""

from audio_grpo.config import initialize
from audio_grpo.parallel.libtpu import quiet_without_tpu
from audio_grpo.plan import Planner

ASR = ("grpo_audio_qwen3_asr", "per_device_batch_size=2", "gradient_accumulation_steps=4")
OMNI = ("grpo_audio_qwen3_omni", "gradient_accumulation_steps=1", "ici_fsdp_parallelism=1", "lora_rank=16")
CASES = [
    *(
        ("Qwen3-ASR-0.6B", topology, (*ASR, "model_name=qwen3-asr-0.6b"))
        for topology in ("v4-2", "v5e-1", "v5p-2", "v6e-1")
    ),
    *(
        (
            "Qwen3-Omni-30B-A3B",
            topology,
            (*OMNI, f"ici_expert_parallelism={chips}", f"per_device_batch_size={8 / chips:g}"),
        )
        for topology, chips in (("v4-8", 4), ("v5e-8", 8), ("v5p-8", 4), ("v6e-8", 8))
    ),
]

if __name__ == "__main__":
    quiet_without_tpu()
    print(
        "| model | slice | tokens a step | GB moved a chip | weights and caches once | of it | GFLOP a token | least |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for model, topology, keys in CASES:
        (program,) = Planner(topology, initialize(list(keys))).plan(phases=("decode burst",)).programs
        step = program.decoding
        assert step is not None, program
        print(
            f"| {model} | {topology} | {step.tokens} | {step.bytes / 1e9:.2f} | {step.least_bytes / 1e9:.2f} "
            f"| **{step.least_bytes / step.bytes:.0%}** | {step.flops / 1e9:.2f} | {step.least_flops / 1e9:.2f} |",
            flush=True,
        )
