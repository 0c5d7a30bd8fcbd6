"""A run as a complete published-layout checkpoint, or its adapters as a PEFT folder."""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from audio_grpo.config import Config, load_config
from audio_grpo.errors import UserError
from audio_grpo.model.checkpoint import create_published, write_published
from audio_grpo.model.checkpoint.writing import appearing_folder
from audio_grpo.model.lora import A, B, merge_adapters
from audio_grpo.model.table import published_names
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import Session, create_session
from audio_grpo.training.weights import RunWeights, run_weights


def export(run_path: str, out: Path) -> Path:
    """Write a run's newest weights to `out`, adapters merged, with the tokenizer.

    Where the run departed from a published checkpoint, everything that training did not touch is carried over byte
    for byte; otherwise the folder is made whole.

    Raises:
        UserError: `run_path` is no run, or `out` exists.
    """
    session, found = _open(run_path)
    weights = merge_adapters(found.weights, session.spec.lora_scale)
    if found.published is not None:
        changed = {key.replace(A, ".weight").replace(B, ".weight") for key in found.trained}
        write_published(weights, session.base, out, source=found.published, changed=changed)
        return out
    create_published(weights, session.spec, out, family=session.config.decoder_block, special=session.special)
    session.tokenizer.backend.save(str(out / "tokenizer.json"))
    return out


def export_adapters(run_path: str, out: Path) -> Path:
    """Write a run's adapters to `out` as PEFT does: adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: `run_path` is no run, has no adapters, has some that PEFT can not hold, or `out` exists.
    """
    session, found = _open(run_path)
    config = session.config
    if not session.adapters:
        raise UserError(f"{run_path} has no adapters, its lora_rank is 0: export it without --adapter-only.")
    if any(".experts." in key for key in session.adapters):
        raise UserError(
            f"{run_path} has adapters of single experts, whose matrices are one tensor for all experts in other "
            "software, so PEFT has no place for them: export it without --adapter-only, which merges them."
        )
    tensors = {}
    for key, weight in session.adapters.items():
        value = np.asarray(found.weights[key].astype("float32"))
        for name, index in published_names(key, weight):
            tensors[f"base_model.model.{_module(name, config)}"] = np.ascontiguousarray(value[index])
    adapted = [re.escape(_module(key.removesuffix(A), config)) for key in session.adapters if key.endswith(A)]
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.load_parameters_path,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "target_modules": "|".join(adapted).replace(r"\*", r"\d+"),
        "lora_dropout": config.lora_dropout,
        "bias": "none",
    }
    with appearing_folder(out) as folder:
        if folder is not None:
            save_file(tensors, str(folder / "adapter_model.safetensors"))
            (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return out


def _module(name: str, config: Config) -> str:
    """The name of a weight's module in transformers 5, which is what PEFT goes by."""
    if config.decoder_block == "qwen3_asr":
        for ours, theirs in (("proj1", "linear_1"), ("proj2", "linear_2")):
            name = name.replace(f"audio_tower.{ours}", f"multi_modal_projector.{theirs}")
    name = re.sub(r"^model\.layers", "model.language_model.layers", name)
    name = re.sub(r"^(audio_tower|multi_modal_projector)", r"model.\1", name)
    return f"thinker.{name}" if config.decoder_block == "qwen3_omni" else name


def _open(run_path: str) -> tuple[Session, RunWeights]:
    run = RunFolder.open(run_path)
    session = create_session(load_config(str(run.config_path)))
    return session, run_weights(session, run)
