"""Against what the published implementation made of tiny checkpoints (see parity/make_goldens.py)."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.audio import audio_token_count, log_mel
from audio_grpo.config import Config
from audio_grpo.model.checkpoint import read_published, spec_from_published
from audio_grpo.model.spec import ThinkerSpec, thinker_spec
from audio_grpo.model.table import Weights
from audio_grpo.model.thinker import hear, output_head, prefill, thinker_table
from audio_grpo.parallel.mesh import create_mesh
from audio_grpo.rollout import OfflineEngine
from audio_grpo.types import AudioBatch, InputData, PromptBatch
from small_model import SPECIAL

GOLDEN = Path(__file__).parent.parent / "golden"


class Golden(NamedTuple):
    config: Config
    weights: Weights
    expected: dict[str, np.ndarray]

    @property
    def spec(self) -> ThinkerSpec:
        return thinker_spec(self.config)

    @property
    def audio(self) -> AudioBatch:
        return AudioBatch(self.expected["features"].astype(np.float32), self.expected["frames"])


@pytest.fixture(scope="module", params=["omni-experts", "omni-dense", "asr"])
def golden(request: pytest.FixtureRequest) -> Golden:
    folder = GOLDEN / request.param
    settings = {
        "use_grpo": False,
        "decode_sampling_strategy": "greedy",
        "num_generations": 1,
        "max_prefill_predict_length": 32,
        "max_target_length": 38,
    }
    config = Config.model_validate({**spec_from_published(folder).settings, **settings})
    table = thinker_table(thinker_spec(config))
    mesh = create_mesh(config, jax.devices()[:1])
    weights = read_published(folder, table, mesh, jnp.dtype(jnp.float32))
    with np.load(folder / "expected.npz") as expected:
        return Golden(config, weights, dict(expected))


def assert_close(ours: jax.Array | np.ndarray, reference: np.ndarray) -> None:
    """Within 1e-4 of the largest value."""
    assert ours.shape == reference.shape
    assert np.abs(np.asarray(ours) - reference).max() <= 1e-4 * np.abs(reference).max()


def test_the_audio_tower_hears_what_the_published_one_hears(golden: Golden) -> None:
    heard = np.asarray(jax.jit(partial(hear, golden.spec))(golden.weights, golden.audio))
    counts = audio_token_count(golden.expected["frames"])
    assert_close(np.concatenate([row[:n] for row, n in zip(heard, counts, strict=True)]), golden.expected["heard"])


def test_the_model_predicts_what_the_published_one_predicts(golden: Golden) -> None:
    prompts = PromptBatch(golden.expected["tokens"], golden.expected["true_length"])

    def logits(weights: Weights, prompts: PromptBatch, audio: AudioBatch) -> jax.Array:
        heard = hear(golden.spec, weights, audio)
        hidden, _ = prefill(golden.spec, weights, prompts, heard, int(golden.expected["audio_pad"]))
        return hidden @ output_head(weights).T

    assert_close(jax.jit(logits)(golden.weights, prompts, golden.audio), golden.expected["logits"])


def test_the_engine_answers_what_the_published_model_answers(golden: Golden) -> None:
    frames = int(golden.expected["frames"][0])
    request = InputData(
        id="first",
        tokens=golden.expected["tokens"][0],
        true_length=int(golden.expected["true_length"][0]),
        audio_features=golden.audio.features[0, :, :frames],
    )
    result = OfflineEngine(golden.config, golden.weights, special=replace(SPECIAL, never_sampled=())).batch_inference(
        [request]
    )
    assert result[0].completions[0].token_ids.tolist() == golden.expected["greedy"].tolist()


def test_log_mel_features_are_the_published_ones() -> None:
    with np.load(GOLDEN / "log_mel.npz") as expected:
        ours = log_mel(expected["samples"].astype(np.float32) / 32768)
        np.testing.assert_allclose(ours, expected["features"], rtol=0, atol=1e-4)
