import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.model.checkpoint import create_published, read_published, spec_from_published, write_published
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import Table
from audio_grpo.model.thinker import thinker_table
from audio_grpo.parallel.mesh import create_mesh
from small_model import SPECIAL, random_weights, small_config

NO_EXPERTS = {key: Config.model_fields[key].default for key in ("num_experts_per_tok", "moe_mlp_dim")}
KINDS = {
    "experts": small_config(num_experts=4),
    "dense": small_config(**NO_EXPERTS),
    "asr": small_config(**NO_EXPERTS, decoder_block="qwen3_asr", logits_via_embedding=True),
}
Tensors = dict[str, np.ndarray]


def table_of(config: Config) -> Table:
    return thinker_table(thinker_spec(config))


def create(config: Config, folder: Path, shard_bytes: int = 1 << 30) -> dict[str, jax.Array]:
    weights = random_weights(config)
    create_published(
        weights,
        thinker_spec(config),
        folder,
        family=config.decoder_block,
        special=SPECIAL,
        shard_bytes=shard_bytes,
    )
    return weights


def read(folder: Path, **settings: object) -> dict[str, jax.Array]:
    config = Config.model_validate({**spec_from_published(folder).settings, "use_grpo": False, **settings})
    return read_published(folder, table_of(config), create_mesh(config), jnp.dtype(jnp.float32))


def assert_same(one: dict[str, jax.Array], other: dict[str, jax.Array]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(other[key]), key)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind, in one file."""
    base = tmp_path_factory.mktemp("published")
    for kind, config in KINDS.items():
        create(config, base / kind)
    return {kind: base / kind for kind in KINDS}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_created_is_read_again(kind: str, shard_bytes: int, tmp_path: Path) -> None:
    weights = create(KINDS[kind], tmp_path / "out", shard_bytes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > (1 if shard_bytes == 50_000 else 0)
    assert_same(weights, read(tmp_path / "out"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_described_as_it_was_configured(kind: str, folders: dict[str, Path]) -> None:
    model = spec_from_published(folders[kind])
    described = Config.model_validate({**model.settings, "use_grpo": False})
    assert thinker_spec(described) == thinker_spec(KINDS[kind])
    assert described.decoder_block == KINDS[kind].decoder_block
    assert model.audio_pad == SPECIAL.audio_pad


def test_files_hold_what_the_safetensors_library_sees(folders: dict[str, Path]) -> None:
    stored = load_file(folders["experts"] / "model.safetensors")
    weights = random_weights(KINDS["experts"])
    up = weights["model.layers.*.mlp.experts.*.up_proj.weight"]
    np.testing.assert_array_equal(stored["thinker.model.layers.1.mlp.experts.3.up_proj.weight"], up[1, 3])
    assert stored["thinker.visual.patch_embed.proj.weight"].ndim == 5


def without_thinker(name: str) -> str:
    return name.removeprefix("thinker.")


def as_in_memory(name: str) -> str:
    for prefix in ("audio_tower.", "visual."):
        name = name.replace(f"thinker.{prefix}", f"model.{prefix}")
    return name.replace("thinker.model.", "model.language_model.").replace("thinker.lm_head", "lm_head")


def as_hf(name: str) -> str:
    name = name.replace("thinker.audio_tower.proj", "model.multi_modal_projector.linear_")
    return as_in_memory(name)


@pytest.mark.parametrize(
    ("kind", "rename"),
    [("experts", without_thinker), ("experts", as_in_memory), ("asr", without_thinker), ("asr", as_hf)],
)
def test_every_spelling_of_the_names_is_read(
    kind: str, rename: Callable[[str], str], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copyfile(folders[kind] / "config.json", tmp_path / "config.json")
    stored = load_file(folders[kind] / "model.safetensors")
    save_file({rename(name): value for name, value in stored.items()}, tmp_path / "model.safetensors")
    assert_same(read(folders[kind]), read(tmp_path))


def fuse_experts(stored: Tensors) -> Tensors:
    """Each layer's experts as two tensors, the gate's rows before the up projection's."""
    fused = {name: value for name, value in stored.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"thinker.model.layers.{layer}.mlp.experts"
        of_part = {
            part: np.stack([stored[f"{prefix}.{e}.{part}_proj.weight"] for e in range(4)])
            for part in ("gate", "up", "down")
        }
        fused[f"{prefix}.gate_up_proj"] = np.concatenate([of_part["gate"], of_part["up"]], axis=1)
        fused[f"{prefix}.down_proj"] = of_part["down"]
    return fused


def test_fused_experts_are_read_and_written_fused(folders: dict[str, Path], tmp_path: Path) -> None:
    source, table = tmp_path / "source", table_of(KINDS["experts"])
    source.mkdir()
    shutil.copyfile(folders["experts"] / "config.json", source / "config.json")
    save_file(fuse_experts(load_file(folders["experts"] / "model.safetensors")), source / "model.safetensors")
    weights = read(source)
    assert_same(read(folders["experts"]), weights)
    trained = {key: value + 1 for key, value in weights.items()}
    write_published(trained, table, tmp_path / "out", source=source, changed=set(table))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    assert_same(trained, read(tmp_path / "out"))


def test_several_files_need_no_index(tmp_path: Path) -> None:
    weights = create(KINDS["dense"], tmp_path / "out", shard_bytes=50_000)
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    assert_same(weights, read(tmp_path / "out"))


def test_a_tied_head_need_not_be_stored(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copyfile(folders["asr"] / "config.json", tmp_path / "config.json")
    stored = load_file(folders["asr"] / "model.safetensors")
    del stored["thinker.lm_head.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    assert_same(read(folders["asr"]), read(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"tensor": 2, "fsdp": 2}, {"tensor": 2, "data": 2}, {"expert": 4}])
def test_sharded_reading_gives_the_same_weights(kind: str, mesh: dict[str, int], folders: dict[str, Path]) -> None:
    if "expert" in mesh and kind != "experts":
        mesh = {"data": 4}
    sizes = {f"ici_{axis}_parallelism": mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "expert")}
    sharded = read(folders[kind], **sizes)
    assert_same(read(folders[kind], ici_fsdp_parallelism=1, ici_data_parallelism=4), sharded)
    query = sharded["model.layers.*.self_attn.q_proj.weight"]
    whole = query.shape[1] * query.shape[2]
    shard = query.addressable_shards[0].data.shape
    assert whole == shard[1] * shard[2] * np.prod([mesh.get(axis, 1) for axis in ("tensor", "fsdp", "expert")])


def test_weights_are_cast_as_they_are_read(folders: dict[str, Path]) -> None:
    config = KINDS["dense"]
    weights = read_published(folders["dense"], table_of(config), create_mesh(config), jnp.dtype(jnp.bfloat16))
    expected = random_weights(config)
    for key, value in weights.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[key].astype(jnp.bfloat16)), key)


def test_writing_replaces_changed_weights_and_carries_all_else(tmp_path: Path) -> None:
    config, source, out = KINDS["experts"], tmp_path / "source", tmp_path / "out"
    weights = create(config, source, shard_bytes=50_000)
    (source / "tokenizer.json").write_text("{}")
    (source / "assets").mkdir()
    (source / "assets" / "note.txt").write_text("kept")
    changed = {"model.norm.weight", "model.layers.*.mlp.experts.*.down_proj.weight"}
    trained = {key: value + 1 if key in changed else value * np.nan for key, value in weights.items()}
    write_published(trained, table_of(config), out, source=source, changed=changed)
    assert_same({**weights, **{key: trained[key] for key in changed}}, read(out))
    assert {p.relative_to(source) for p in source.rglob("*")} == {p.relative_to(out) for p in out.rglob("*")}
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    rewritten = {file for name, file in weight_map.items() if "model.norm" in name or "down_proj" in name}
    assert 0 < len(rewritten) < len(set(weight_map.values()))
    for path in filter(Path.is_file, source.rglob("*")):
        same = path.read_bytes() == (out / path.relative_to(source)).read_bytes()
        assert same == (path.name not in rewritten), path
    assert not list(tmp_path.glob(".out*"))


def test_a_trained_tied_embedding_is_written_as_the_head_too(folders: dict[str, Path], tmp_path: Path) -> None:
    config = KINDS["asr"]
    weights = read(folders["asr"])
    trained = {key: value + 1 for key, value in weights.items()}
    write_published(
        trained, table_of(config), tmp_path / "out", source=folders["asr"], changed={"model.embed_tokens.weight"}
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = np.asarray(trained["model.embed_tokens.weight"])
    np.testing.assert_array_equal(stored["thinker.model.embed_tokens.weight"], expected)
    np.testing.assert_array_equal(stored["thinker.lm_head.weight"], expected)


def test_changed_weights_are_stored_in_the_dtype_of_the_source(tmp_path: Path) -> None:
    config = KINDS["dense"]
    weights = {key: value.astype(jnp.bfloat16) for key, value in random_weights(config).items()}
    create_published(weights, thinker_spec(config), tmp_path / "source", family="qwen3_omni", special=SPECIAL)
    trained = {key: value.astype(jnp.float32) + 1 for key, value in weights.items()}
    table = table_of(config)
    write_published(trained, table, tmp_path / "out", source=tmp_path / "source", changed=set(table))
    rounded = {key: value.astype(jnp.bfloat16).astype(jnp.float32) for key, value in trained.items()}
    assert_same(rounded, read(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == (
        tmp_path / "source" / "model.safetensors"
    ).stat().st_size


def test_sharded_weights_are_written_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    config = KINDS["experts"]
    table = table_of(config)
    sharded = read(folders["experts"], ici_tensor_parallelism=2, ici_expert_parallelism=2, ici_fsdp_parallelism=1)
    write_published(sharded, table, tmp_path / "out", source=folders["experts"], changed=set(table))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        folders["experts"] / "model.safetensors"
    ).read_bytes()


def test_an_existing_folder_is_not_written_over(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        create(KINDS["dense"], tmp_path)
    table = table_of(KINDS["dense"])
    with pytest.raises(UserError, match="exists already"):
        write_published({}, table, folders["asr"], source=folders["dense"], changed=set())


def test_a_failed_export_leaves_nothing_behind(folders: dict[str, Path], tmp_path: Path) -> None:
    table = table_of(KINDS["dense"])
    with pytest.raises(KeyError):
        write_published({}, table, tmp_path / "out", source=folders["dense"], changed={"model.norm.weight"})
    assert not list(tmp_path.iterdir())
