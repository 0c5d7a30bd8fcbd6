import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from audio_grpo import inference
from audio_grpo.config import to_yaml
from audio_grpo.errors import UserError
from audio_grpo.inference.export import _module
from audio_grpo.training import weights
from small_model import small_config

TINY = {
    "vocab_size": 1024,
    "tokenizer_path": "audio-grpo/tiny",
    "logits_via_embedding": True,
    "template": "transcript",
    "num_decoder_layers": 1,
}


def run_of(folder, **changes):
    """The folder of a run that has taken no step."""
    folder.mkdir()
    (folder / "config.yml").write_text(to_yaml(small_config(**TINY, **changes)))
    return str(folder)


@pytest.mark.parametrize(
    ("family", "name", "module"),
    [
        (
            "qwen3_omni",
            "model.layers.3.self_attn.q_proj",
            "thinker.model.language_model.layers.3.self_attn.q_proj",
        ),
        ("qwen3_omni", "audio_tower.layers.0.fc1", "thinker.model.audio_tower.layers.0.fc1"),
        ("qwen3_asr", "model.layers.3.mlp.up_proj", "model.language_model.layers.3.mlp.up_proj"),
        ("qwen3_asr", "audio_tower.proj2", "model.multi_modal_projector.linear_2"),
    ],
)
def test_adapters_bear_the_names_of_transformers_modules(family, name, module):
    assert _module(name, small_config(decoder_block=family)) == module


def test_adapters_are_written_as_peft_reads_them(tmp_path):
    run = run_of(tmp_path / "run", lora_rank=2, lora_alpha=8.0)
    out = inference.export_adapters(run, tmp_path / "adapters")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 2, 8.0)
    tensors = load_file(out / "adapter_model.safetensors")
    name = "base_model.model.thinker.model.language_model.layers.0.self_attn.v_proj"
    assert tensors[f"{name}.lora_A.weight"].shape == (2, 32)
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], np.zeros((16, 2)))
    assert len(tensors) == 2 * 4


def test_a_run_without_adapters_has_none_to_export(tmp_path):
    with pytest.raises(UserError, match="lora_rank is 0"):
        inference.export_adapters(run_of(tmp_path / "run"), tmp_path / "adapters")


def test_adapters_of_experts_have_no_peft_form_but_are_merged(tmp_path, monkeypatch):
    keys = {"num_experts": 2, "num_experts_per_tok": 1, "moe_mlp_dim": 16}
    run = run_of(tmp_path / "run", lora_rank=2, lora_target_modules=["model.layers.*.mlp.*_proj"], **keys)
    with pytest.raises(UserError, match="without --adapter-only"):
        inference.export_adapters(run, tmp_path / "adapters")
    drawn = weights.initialize

    def loud(table, key, dtype):
        values = drawn(table, key, dtype)
        return {name: value + 0.5 if name.endswith(".lora_B.weight") else value for name, value in values.items()}

    monkeypatch.setattr(weights, "initialize", loud)
    adapted = inference.open_checkpoint(run).weights
    merged = inference.open_checkpoint(str(inference.export(run, tmp_path / "whole"))).weights
    name = "model.layers.*.mlp.experts.*.up_proj"
    a, b = (np.asarray(adapted[f"{name}.lora_{side}.weight"]) for side in "AB")
    assert np.abs(b).min() > 0
    expected = np.asarray(adapted[f"{name}.weight"]) + 16.0 * np.einsum("leor,leri->leoi", b, a)
    np.testing.assert_allclose(merged[f"{name}.weight"], expected, atol=1e-4)


def test_a_run_from_random_weights_is_exported_whole(tmp_path):
    out = inference.export(run_of(tmp_path / "run"), tmp_path / "whole")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert inference.open_checkpoint(str(out)).tokenizer is not None


def test_an_export_overwrites_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        inference.export(run_of(tmp_path / "run"), tmp_path / "there")
