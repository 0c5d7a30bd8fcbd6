import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.model.checkpoint import create_published, read_published, spec_from_published
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.thinker import thinker_table
from audio_grpo.parallel.mesh import create_mesh
from small_model import SPECIAL, random_weights, small_config

CONFIG = small_config(num_experts=2, num_experts_per_tok=1)
Json = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "whole"
    create_published(random_weights(CONFIG), thinker_spec(CONFIG), folder, family="qwen3_omni", special=SPECIAL)
    return folder


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, spec = tmp_path_factory.mktemp("published") / "parts", thinker_spec(CONFIG)
    create_published(random_weights(CONFIG), spec, folder, family="qwen3_omni", special=SPECIAL, shard_bytes=60_000)
    return folder


def refusal(folder: Path) -> str:
    """What the user is told; fails where the folder is read all the same."""
    with pytest.raises(UserError) as caught:
        config = Config.model_validate({**spec_from_published(folder).settings, "use_grpo": False})
        table = thinker_table(thinker_spec(config))
        read_published(folder, table, create_mesh(config), jnp.dtype(jnp.float32))
    return str(caught.value)


def with_config(whole: Path, folder: Path, change: Callable[[Json], None]) -> Path:
    """The folder with another config.json; its tensors are the same files."""
    folder.mkdir(exist_ok=True)
    config = json.loads((whole / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    if not (folder / "model.safetensors").exists():
        (folder / "model.safetensors").symlink_to(whole / "model.safetensors")
    return folder


ABSURD = (-1, 0, "8", 10**9, 2.5, [], {}, True)
SIZES = {
    "text_config": [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "moe_intermediate_size",
        "num_experts_per_tok",
    ],
    "audio_config": [
        "d_model",
        "encoder_layers",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "downsample_hidden_size",
        "output_dim",
        "num_mel_bins",
        "n_window",
        "n_window_infer",
    ],
}


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in SIZES.items() for key in keys])
def test_an_absurd_size_is_refused_by_its_key(section: str, key: str, whole: Path, tmp_path: Path) -> None:
    for value in ABSURD:
        folder = with_config(whole, tmp_path, lambda c, v=value: c["thinker_config"][section].update({key: v}))
        assert f"{section}.{key}" in refusal(folder), value


def test_a_missing_size_is_refused_by_its_key(whole: Path, tmp_path: Path) -> None:
    for section, keys in SIZES.items():
        for key in set(keys) - {"head_dim"}:
            folder = with_config(whole, tmp_path, lambda c, s=section, k=key: c["thinker_config"][s].pop(k))
            assert f"{section}.{key} is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "attention_bias", True),
        ("text_config", "use_sliding_window", True),
        ("text_config", "layer_types", ["full_attention", "sliding_attention"]),
        ("text_config", "decoder_sparse_step", 2),
        ("text_config", "shared_expert_intermediate_size", 64),
        ("text_config", "mlp_only_layers", [1]),
        ("text_config", "num_key_value_heads", 3),
        ("text_config", "num_experts_per_tok", 3),
        ("text_config", "norm_topk_prob", "yes"),
        ("text_config", "rms_norm_eps", 0),
        ("text_config", "rope_theta", -1),
        ("text_config", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("text_config", "rope_scaling", {"mrope_section": [24, 20, 20]}),
        ("text_config", "rope_parameters", {"rope_theta": 5e5}),
        ("audio_config", "activation_function", "relu"),
        ("audio_config", "scale_embedding", True),
        ("audio_config", "n_window_infer", 750),
        ("audio_config", "encoder_attention_heads", 3),
        ("audio_config", "output_dim", 48),
    ],
)
def test_what_the_model_does_not_do_is_refused_by_its_key(
    section: str, key: str, value: object, whole: Path, tmp_path: Path
) -> None:
    folder = with_config(whole, tmp_path, lambda c: c["thinker_config"][section].update({key: value}))
    named = "rope_theta" if key == "rope_parameters" else key
    assert named in refusal(folder) or "mrope_section" in refusal(folder)


@pytest.mark.parametrize("model_type", ["qwen2_5_omni", None, 3])
def test_another_kind_of_model_is_refused(model_type: object, whole: Path, tmp_path: Path) -> None:
    folder = with_config(whole, tmp_path, lambda c: c.update(model_type=model_type))
    assert f"model_type {model_type!r}" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "qwen3_omni_moe", "thinker_config": 3}'])
def test_a_broken_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path / "config.json") in refusal(tmp_path)


def test_a_folder_without_files_is_refused(whole: Path, tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)
    shutil.copyfile(whole / "config.json", tmp_path / "config.json")
    assert "holds no safetensors file" in refusal(tmp_path)


def tensor_faults(stored: dict[str, np.ndarray]) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
    """(tensor, what the message says of it, tensors with a fault in that one) for every tensor of the thinker."""
    for name, value in stored.items():
        if ".visual." in name:
            continue
        known = name.removeprefix("thinker.")
        others = {other: array for other, array in stored.items() if other != name}
        yield known, "missing", others
        yield f"{known}s", "unexpected", {**others, f"{name}s": value}
        yield (
            f"{known} {[*value.shape[:-1], value.shape[-1] + 1]}",
            "of a wrong shape",
            {
                **others,
                name: np.concatenate([value, value[..., :1]], axis=-1),
            },
        )
        yield f"{known} I32", "of a dtype other than", {**others, name: value.astype(np.int32)}
        yield known, "stored twice", {**stored, known: value}


def test_each_faulty_tensor_is_refused_by_name(whole: Path, tmp_path: Path) -> None:
    shutil.copyfile(whole / "config.json", tmp_path / "config.json")
    stored = load_file(whole / "model.safetensors")
    faults = list(tensor_faults(stored))
    assert len(faults) > 300
    for name, kind, tensors in random.Random(0).sample(faults, 120):
        save_file(tensors, tmp_path / "model.safetensors")
        message = refusal(tmp_path)
        assert name in message and kind in message, message


def test_all_faults_are_told_together(whole: Path, tmp_path: Path) -> None:
    shutil.copyfile(whole / "config.json", tmp_path / "config.json")
    stored = load_file(whole / "model.safetensors")
    for name in ("thinker.lm_head.weight", "thinker.model.norm.weight"):
        del stored[name]
    stored["thinker.model.extra"] = np.zeros(3, np.float32)
    save_file(stored, tmp_path / "model.safetensors")
    assert refusal(tmp_path) == (
        f"{tmp_path} does not hold the model that its config.json describes: tensors 2 missing: lm_head.weight, "
        "model.norm.weight; 1 unexpected: model.extra."
    )


def test_a_cut_file_is_refused_by_name(whole: Path, tmp_path: Path) -> None:
    shutil.copyfile(whole / "config.json", tmp_path / "config.json")
    content = (whole / "model.safetensors").read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 7, 8, 9, len(content) - 1, *(rng.randrange(len(content)) for _ in range(50))]:
        (tmp_path / "model.safetensors").write_bytes(content[:length])
        assert str(tmp_path / "model.safetensors") in refusal(tmp_path), length


def test_a_longer_file_is_refused_by_name(whole: Path, tmp_path: Path) -> None:
    shutil.copyfile(whole / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes() + b"\0")
    assert str(tmp_path / "model.safetensors") in refusal(tmp_path)


def test_a_corrupt_header_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copyfile(whole / "config.json", tmp_path / "config.json")
    content = bytearray((whole / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    first = content.index(b'"thinker.')
    rng = random.Random(0)
    for position in [*range(8), *(rng.randrange(first, header) for _ in range(100))]:
        corrupt = bytearray(content)
        corrupt[position] ^= 1 << rng.randrange(7)
        if b"visual" in content[content.rindex(b'"thinker.', 0, max(position, first) + 9) :][:20]:
            continue
        (tmp_path / "model.safetensors").write_bytes(corrupt)
        assert str(tmp_path) in refusal(tmp_path), position


def test_a_missing_part_is_refused_by_name(in_parts: Path, tmp_path: Path) -> None:
    parts = sorted(in_parts.glob("*.safetensors"))
    assert len(parts) > 3
    for part in parts:
        shutil.copytree(in_parts, tmp_path / part.name)
        (tmp_path / part.name / part.name).unlink()
        assert part.name in refusal(tmp_path / part.name)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_broken_index_is_refused_by_name(text: str, in_parts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(in_parts, tmp_path / "copy")
    (folder / "model.safetensors.index.json").write_text(text)
    assert str(folder / "model.safetensors.index.json") in refusal(folder)


def test_an_index_that_does_not_fit_its_files_is_refused(in_parts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(in_parts, tmp_path / "copy")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = last
    path.write_text(json.dumps(index))
    message = refusal(folder)
    assert f"1 named in the index, but not in its file: {moved}" in message
    assert f"1 in a file, but not named there by the index: {moved}" in message


def test_a_head_that_is_not_the_tied_embedding_is_refused(tmp_path: Path) -> None:
    config = small_config(decoder_block="qwen3_asr", logits_via_embedding=True)
    create_published(
        random_weights(config), thinker_spec(config), tmp_path / "asr", family="qwen3_asr", special=SPECIAL
    )
    file = tmp_path / "asr" / "model.safetensors"
    stored = load_file(file)
    stored["thinker.lm_head.weight"] = stored["thinker.lm_head.weight"].copy()
    stored["thinker.lm_head.weight"][-1, -1] += 1
    save_file(stored, file)
    assert "tie_word_embeddings" in refusal(tmp_path / "asr")
