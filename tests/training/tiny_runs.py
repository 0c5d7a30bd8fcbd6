"""Runs of a very small model on tones, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from audio_grpo.config import Config
from audio_grpo.data import synthesize
from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.run_folder import RunFolder

TINY = {
    "num_decoder_layers": 1,
    "emb_dim": 32,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 48,
    "vocab_size": 1024,
    "logits_via_embedding": True,
    "d_model_for_audio": 16,
    "encoder_layers_for_audio": 1,
    "encoder_attention_heads_for_audio": 2,
    "downsample_hidden_size_for_audio": 4,
    "tokenizer_path": "audio-grpo/tiny",
    "template": "transcript",
    "max_prefill_predict_length": 72,
    "max_target_length": 84,
    "audio_max_seconds": 3.0,
    "num_generations": 2,
    "reward_functions": ["asr_wer_reward"],
    "per_device_batch_size": 1,
    "learning_rate": 1e-3,
    "enable_tensorboard": False,
    "jax_cache_dir": "",
}
TIMINGS = {"step_time", "tokens_per_second", "audio_seconds_per_second"}


MEASURED = ("seconds/", "memory/")


def tiny_config(folder: Path, **changes: Any) -> Config:
    """A run in `folder`/runs on the clips in `folder`/data."""
    places = {"base_output_directory": str(folder / "runs"), "grain_train_files": str(folder / "data")}
    return Config.model_validate(TINY | places | changes)


def with_tones(folder: Path, count: int = 12) -> Path:
    synthesize(folder / "data", "tones", count)
    return folder


@contextmanager
def kept_programs(folder: Path) -> Iterator[None]:
    """Programs compiled meanwhile are kept in `folder`, so that runs that need the same ones compile them once."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # a process that compiled without a folder would go on without
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def metrics_of(run: RunFolder) -> list[dict[str, Any]]:
    """Every step's metrics but those that clocks and memory decide about."""
    records = JsonLinesFile(run.metrics_path).read().records
    return [
        {name: value for name, value in record.items() if name not in TIMINGS and not name.startswith(MEASURED)}
        for record in records
    ]
