"""Files, presets and overrides resolve in one order, and a resolved configuration is a file again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from etils.epath.testing import mock_epath
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from audio_grpo.config import Config, Template, initialize, load_config, to_yaml
from audio_grpo.errors import UserError

RECIPE = """\
base_config: "base.yml"
model_name: "qwen3-omni-test"
use_multimodal: true
use_audio: true
freeze_audio_encoder_params: true
freeze_vision_encoder_params: true
use_grpo: true
num_generations: 2
grpo_beta: 0.04
grpo_epsilon: 0.2
reasoning_start_token: '<reasoning>'
reasoning_end_token: '</reasoning>'
solution_start_token: '<answer>'
solution_end_token: '</answer>'
reward_exact_format_match: 3.0
asr_reward_cap: 2.0
asr_exact_match_bonus: 3.0
asr_format_bonus: 1.0
asr_no_answer_penalty: -2.0
max_prefill_predict_length: 128
max_target_length: 256
dataset_type: grain
grain_file_type: arrayrecord
train_data_columns: 'ar'
grain_train_files: "/path/to/test_grpo_data/"
tokenizer_type: "huggingface"
tokenizer_path: "Qwen/Qwen3-Omni-30B-A3B-Instruct"
decode_sampling_strategy: "weighted"
decode_sampling_temperature: 0.9
return_log_prob: true
inference_rollouts: 1
inference_devices_per_replica: 4
inference_replicas: 1
weight_dtype: 'bfloat16'
attention: 'dot_product'
per_device_batch_size: 2
learning_rate: 1.0e-5
enable_dropout: false
steps: 10
async_checkpointing: false
add_bos: false
add_eos: false
"""
MODEL = """\
model_name: "qwen3-omni-test"
decoder_block: "qwen3_omni"
num_decoder_layers: 2
num_query_heads: 4
num_kv_heads: 2
head_dim: 64
mlp_dim: 512
emb_dim: 256
vocab_size: 152064
use_multimodal: true
use_audio: true
num_experts: 0
"""
RECIPES = ["base", "grpo_audio_qwen3_omni", "grpo_audio_qwen3_omni_test", "tiny"]
MODELS = ["qwen3-asr-0.6b", "qwen3-asr-1.7b", "qwen3-omni-30b-a3b", "qwen3-omni-test"]

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return _write


def test_a_maxtext_audio_grpo_file_loads_as_it_is(write: Write) -> None:
    config = load_config(write("recipe.yml", RECIPE))
    assert config.learning_rate == 1e-5
    assert config.weight_dtype == "bfloat16"
    assert (config.prompt_column, config.max_completion_length) == ("ar", 128)
    assert config == load_config("grpo_audio_qwen3_omni_test")


def test_the_model_file_beside_the_recipe_is_preferred_to_the_preset(write: Write) -> None:
    recipe = write("recipe.yml", RECIPE)
    write("models/qwen3-omni-test.yml", MODEL.replace("head_dim: 64", "head_dim: 32"))
    assert load_config(recipe).head_dim == 32
    write("qwen3-omni-test.yml", MODEL.replace("head_dim: 64", "head_dim: 16"))
    assert load_config(recipe).head_dim == 16


@pytest.mark.parametrize("name", [*RECIPES, *MODELS])
def test_every_preset_loads_by_name(name: str) -> None:
    config = load_config(name)
    assert config.model_name == (
        name if name in MODELS or name == "tiny" else load_config(config.model_name).model_name
    )


def test_a_key_is_taken_from_override_then_file_then_base_then_model_then_default(write: Write) -> None:
    write("m.yml", "head_dim: 1\nnum_kv_heads: 1\nmlp_dim: 1\nemb_dim: 1\noutput_dim_for_audio: null")
    write("root.yml", "num_kv_heads: 2\nmlp_dim: 2\nemb_dim: 2\nmodel_name: m")
    write("middle.yml", "base_config: root.yml\nmlp_dim: 3\nemb_dim: 3")
    config = load_config(write("top.yml", "base_config: middle.yml\nemb_dim: 4"), ["emb_dim=5"])
    found = (config.num_query_heads, config.head_dim, config.num_kv_heads, config.mlp_dim, config.emb_dim)
    assert found == (Config.model_fields["num_query_heads"].default, 1, 2, 3, 5)


def test_an_overridden_model_name_brings_its_own_model_file() -> None:
    config = load_config("grpo_audio_qwen3_omni_test", ["model_name=qwen3-asr-1.7b"])
    assert (config.emb_dim, config.logits_via_embedding) == (2048, True)


def test_base_config_may_be_a_packaged_recipe(write: Write) -> None:
    assert load_config(write("mine.yml", "base_config: tiny\nsteps: 7")).num_generations == 8


def test_a_file_is_preferred_to_a_preset_of_the_same_name(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(write("tiny", "steps: 77")).parent)
    assert load_config("tiny").steps == 77


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.1e-4", ".1e-4", "+1e-5", "0.00001"])
def test_every_spelling_of_a_number_is_a_number(write: Write, text: str) -> None:
    assert load_config(write("n.yml", f"learning_rate: {text}")).learning_rate == pytest.approx(1e-5, rel=1e-12)
    assert load_config("base", [f"learning_rate={text}"]).learning_rate == pytest.approx(1e-5, rel=1e-12)


def test_overrides_are_yaml_values() -> None:
    config = load_config("base", ["reward_weights=[1, 2.5]", "language=Arabic", "instruction=null", "use_grpo=false"])
    assert config.reward_weights == [1.0, 2.5]
    assert (config.language, config.instruction, config.use_grpo) == ("Arabic", None, False)


def test_an_override_keeps_the_equals_signs_of_its_value() -> None:
    assert load_config("base", ["instruction=a=b=c"]).instruction == "a=b=c"


def test_initialize_takes_what_the_command_line_gives() -> None:
    assert initialize(["tiny", "steps=3"]) == load_config("tiny", ["steps=3"])


def test_initialize_without_a_configuration_lists_the_presets() -> None:
    with pytest.raises(UserError, match="grpo_audio_qwen3_omni_test"):
        initialize([])


@pytest.mark.parametrize("name", [*RECIPES, *MODELS])
def test_a_resolved_configuration_loads_to_an_equal_one(write: Write, name: str) -> None:
    config = load_config(name)
    assert load_config(write("resolved.yml", to_yaml(config))) == config


def test_a_resolved_configuration_needs_no_model_file(write: Write) -> None:
    write("my-model.yml", "emb_dim: 96")
    config = load_config(write("recipe.yml", "model_name: my-model"))
    assert load_config(write("elsewhere/resolved.yml", to_yaml(config))) == config


_changes = st.fixed_dictionaries(
    {},
    optional={
        "run_name": st.text(st.characters(exclude_categories=["Cs"]))
        | st.sampled_from(["1e-5", "null", "7", "yes", "a: b"]),
        "solution_start_token": st.text(min_size=1),
        "instruction": st.none() | st.text(),
        "learning_rate": st.floats(0, 1e300),
        "grpo_epsilon": st.floats(1e-300, 0.999),
        "reward_weights": st.none() | st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=2),
        "train_data_columns": st.text(min_size=1) | st.lists(st.text(), min_size=1, max_size=3),
        "template": st.sampled_from(get_args(Template)),
        "steps": st.integers(1, 10**30),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(_changes)
@example({"solution_start_token": "\x85", "instruction": "a\u2028b"})
def test_any_configuration_survives_being_written(write: Write, changes: dict[str, Any]) -> None:
    config = Config(**changes)
    assert load_config(write("any.yml", to_yaml(config))) == config


def test_the_resolved_file_states_every_key_once() -> None:
    lines = [line for line in to_yaml(load_config("tiny")).splitlines() if not line.startswith(("#", "-"))]
    assert sorted(line.split(":")[0] for line in lines if line) == sorted(Config.model_fields)


def test_configurations_are_read_from_remote_storage(write: Write, tmp_path: Path) -> None:
    write("recipe.yml", "base_config: bases/root.yml\nmodel_name: m")
    write("bases/root.yml", "steps: 9")
    write("m.yml", "emb_dim: 48")

    def local(path: object) -> str:
        return str(path).replace("gs://bucket", str(tmp_path))

    with mock_epath(
        exists=lambda fn, path: fn(local(path)),
        isdir=lambda fn, path: fn(local(path)),
        open=lambda fn, path, mode: fn(local(path), mode),
    ):
        config = load_config("gs://bucket/recipe.yml")
    assert (config.steps, config.emb_dim) == (9, 48)
