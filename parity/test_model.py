"""Audio tower, router, logits and log-probabilities of random models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from audio_grpo.audio import audio_token_count
from audio_grpo.model import decoder
from audio_grpo.model.router import Routing
from audio_grpo.types import AudioBatch
from parity.cases import CASES, FRAMES, Case, batches
from parity.conftest import Agree
from parity.ours import Ours, load, padded, random_audio, random_prompts
from parity.reference import Reference, build

COMPLETION, GENERATIONS = 7, 3
TEMPERATURES = (0.3, 1.0, 1.7)
_BATCHES = batches(4)


def _read(case: Case, folder: Path) -> tuple[Reference, Ours]:
    reference = build(case)
    reference.model.save_pretrained(folder)
    ours = load(folder)
    assert ours.spec.audio == case.spec.audio
    return reference, ours


def _compare_towers(agree: Agree, reference: Reference, ours: Ours, audio: AudioBatch) -> jax.Array:
    heard = ours.hear(audio)
    counts = audio_token_count(np.asarray(audio.frames))
    real = [row[:count] for row, count in zip(np.asarray(heard), counts, strict=True)]
    for mine, theirs in zip(real, reference.hear(audio), strict=True):
        agree("audio tower, each clip", mine, theirs)
    return heard


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_random_model_predicts_the_same(case: Case, tmp_path: Path, agree: Agree) -> None:
    reference, ours = _read(case, tmp_path)
    rng = np.random.default_rng(case.seed)
    frames = _BATCHES[case.seed % len(_BATCHES)]
    audio = random_audio(rng, case.spec.audio.mel_bins, frames)
    heard = _compare_towers(agree, reference, ours, audio)

    prompts = random_prompts(rng, case.spec.decoder.vocab, frames)
    completions = rng.integers(20, case.spec.decoder.vocab, size=(len(frames), GENERATIONS, COMPLETION))
    logits = np.asarray(ours.completion_logits(padded(prompts), heard, completions))
    expected = _reference_logits(reference, prompts, completions, audio, "left" if case.seed % 2 else "right")
    agree("logits", logits, expected)
    agree("logits after the prompt", np.asarray(ours.prompt_logits(padded(prompts), heard)), expected[:, 0, 0])
    for temperature in TEMPERATURES:
        scores = ours.log_probs(padded(prompts), heard, completions, temperature)
        log_softmax = torch.tensor(expected / temperature).log_softmax(-1).numpy()
        chosen = np.take_along_axis(log_softmax, completions[..., None], axis=-1)[..., 0]
        agree(f"log-probabilities at temperature {temperature}", np.asarray(scores), chosen, scale=1.0)


def _reference_logits(
    reference: Reference, prompts: Sequence[list[int]], completions: np.ndarray, audio: AudioBatch, padding: str
) -> np.ndarray:
    """Logits [B, G, C, V] from whole sequences, one forward pass for each generation."""
    by_generation = []
    for g in range(GENERATIONS):
        sequences = [[*prompt, *row[g].tolist()] for prompt, row in zip(prompts, completions, strict=True)]
        logits = reference.logits(sequences, audio, padding)
        by_generation.append([row[-COMPLETION - 1 : -1] for row in logits])
    return np.swapaxes(np.asarray(by_generation), 0, 1)


_ROUTED = [case for case in CASES if case.spec.decoder.experts]


@pytest.mark.parametrize("case", _ROUTED, ids=lambda case: case.name)
def test_tokens_go_to_the_same_experts(
    case: Case, tmp_path: Path, equal: Agree, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[np.ndarray] = []
    route = decoder.route

    def recording_route(*arguments: Any, **keywords: Any) -> Routing:
        routing = route(*arguments, **keywords)
        jax.debug.callback(lambda x: chosen.append(np.asarray(x)), routing.chosen, ordered=True)
        return routing

    monkeypatch.setattr(decoder, "route", recording_route)
    reference, ours = _read(case, tmp_path)
    rng = np.random.default_rng(case.seed)
    audio = random_audio(rng, case.spec.audio.mel_bins, [180, 100])
    prompts = random_prompts(rng, case.spec.decoder.vocab, [180, 100])
    reference.logits(prompts, audio, "right")
    jax.block_until_ready(ours.prompt_logits(padded(prompts), ours.hear(audio)))
    jax.effects_barrier()

    prompt = padded(prompts)
    real = (np.arange(prompt.tokens.shape[1]) < np.asarray(prompt.true_length)[:, None]).reshape(-1)
    assert len(chosen) == len(reference.routed) == case.spec.decoder.layers
    for mine, theirs, probabilities in zip(chosen, reference.routed, reference.router_probabilities, strict=True):
        ranked = np.sort(probabilities, axis=-1)[:, ::-1]
        top = mine.shape[1]
        clear = real if top == probabilities.shape[1] else real & (ranked[:, top - 1] - ranked[:, top] > 1e-5)
        equal("experts of a token", np.sort(mine[clear], axis=-1), np.sort(theirs[clear], axis=-1))


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=lambda case: case.family)
def test_clips_of_every_length_sound_the_same(case: Case, tmp_path: Path, agree: Agree) -> None:
    reference, ours = _read(case, tmp_path)
    rng = np.random.default_rng(0)
    assert len(FRAMES) >= 60
    for frames in batches(11):
        _compare_towers(agree, reference, ours, random_audio(rng, case.spec.audio.mel_bins, frames))
