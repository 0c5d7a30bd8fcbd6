"""Checkpoints that we write, loaded by the published implementation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3OmniMoeForConditionalGeneration

from audio_grpo.model.checkpoint import create_published, write_published
from audio_grpo.model.thinker import thinker_table
from parity.cases import CASES, Case
from parity.conftest import Agree
from parity.ours import Ours, load, padded, random_audio, random_prompts
from parity.reference import SPECIAL, Reference, build

FRAMES = (100, 250)
ONE_OF_EACH_KIND = [CASES[0], CASES[12], CASES[15], CASES[22], CASES[29]]


def _compare(agree: Agree, reference: Reference, ours: Ours) -> None:
    rng = np.random.default_rng(0)
    audio = random_audio(rng, ours.spec.audio.mel_bins, FRAMES)
    prompts = random_prompts(rng, ours.spec.decoder.vocab, FRAMES)
    logits = [row[-1] for row in reference.logits(prompts, audio, "right")]
    agree("logits of an export", np.asarray(ours.prompt_logits(padded(prompts), ours.hear(audio))), np.asarray(logits))


def _trained(ours: Ours) -> tuple[Ours, set[str]]:
    """Every weight of the decoder moved a little."""
    changed = {key for key in ours.weights if not key.startswith("audio_tower.")}
    moved = {key: value * 1.1 if key in changed else value for key, value in ours.weights.items()}
    return Ours(ours.config, moved), changed


def _reload(reference: Reference, folder: Path) -> Reference:
    model, info = type(reference.model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return Reference(model.eval(), reference.asr)


@pytest.mark.parametrize("case", ONE_OF_EACH_KIND, ids=lambda case: case.name)
def test_a_trained_checkpoint_is_loaded_by_the_reference(case: Case, tmp_path: Path, agree: Agree) -> None:
    reference = build(case)
    reference.model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    ours, changed = _trained(load(tmp_path / "source"))
    table = thinker_table(ours.spec)
    write_published(ours.weights, table, tmp_path / "out", source=tmp_path / "source", changed=changed)
    _compare(agree, _reload(reference, tmp_path / "out"), ours)


@pytest.mark.parametrize("case", ONE_OF_EACH_KIND[:3], ids=lambda case: case.name)
def test_a_created_checkpoint_is_loaded_by_the_reference(case: Case, tmp_path: Path, agree: Agree) -> None:
    reference = build(case)
    reference.model.save_pretrained(tmp_path / "source")
    ours = load(tmp_path / "source")
    create_published(ours.weights, ours.spec, tmp_path / "out", family=case.family, special=SPECIAL)
    _compare(agree, _reload(reference, tmp_path / "out"), ours)
    _, info = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("case", ONE_OF_EACH_KIND[3:], ids=lambda case: case.name)
def test_a_created_asr_checkpoint_holds_the_reference_weights(case: Case, tmp_path: Path, equal: Agree) -> None:
    """In the original layout, which transformers only reads after conversion."""
    reference = build(case)
    reference.model.save_pretrained(tmp_path / "source")
    ours = load(tmp_path / "source")
    create_published(ours.weights, ours.spec, tmp_path / "out", family=case.family, special=SPECIAL)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    renamed = {_converted(name): value for name, value in stored.items()}
    expected = reference.model.state_dict()
    assert renamed.keys() == expected.keys()
    for name, value in expected.items():
        equal("values of a created Qwen3-ASR", renamed[name].view(torch.int32).numpy(), value.view(torch.int32).numpy())


def _converted(name: str) -> str:
    for original, converted in (
        ("thinker.audio_tower.proj", "model.multi_modal_projector.linear_"),
        ("thinker.audio_tower.", "model.audio_tower."),
        ("thinker.model.", "model.language_model."),
        ("thinker.", ""),
    ):
        if name.startswith(original):
            return converted + name.removeprefix(original)
    return name


@pytest.mark.parametrize("case", ONE_OF_EACH_KIND, ids=lambda case: case.name)
def test_tensors_named_as_in_memory_are_read(case: Case, tmp_path: Path, agree: Agree) -> None:
    """Experts fused, and prefixes as transformers has them in memory."""
    reference = build(case)
    reference.model.save_pretrained(tmp_path)
    state = {name: value.clone() for name, value in reference.model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    _compare(agree, reference, load(tmp_path))
