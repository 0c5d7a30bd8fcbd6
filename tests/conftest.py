"""Strict JAX, four CPU devices, and every annotated array checked at run time."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # compiling is most of the suite's time

from jaxtyping import install_import_hook

install_import_hook(
    ["audio_grpo.audio", "audio_grpo.data", "audio_grpo.model", "audio_grpo.rollout", "audio_grpo.grpo"],
    "beartype.beartype",
)

import jax
import pytest

# The same programs are compiled by many tests and by both workers.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

from audio_grpo.config import Config
from small_model import random_weights, small_config


@pytest.fixture(scope="session", params=[0, 4], ids=["dense", "experts"])
def model(request: pytest.FixtureRequest) -> tuple[Config, dict[str, jax.Array]]:
    config = small_config(num_experts=request.param)
    return config, random_weights(config)
