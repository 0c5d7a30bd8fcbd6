"""Greedy answers of the engine."""

from pathlib import Path

import numpy as np
import pytest
import torch

from audio_grpo.rollout import OfflineEngine
from audio_grpo.types import AudioBatch, InputData
from parity.cases import CASES, Case
from parity.conftest import Agree
from parity.ours import load, random_audio, random_prompts
from parity.reference import SPECIAL, build

PROMPT, COMPLETION = 160, 12
FRAMES = (100, 131, 333, 799, 801, 1012)
MARGIN = 1e-3
"""Between the two largest logits: below it, rounding may decide."""


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_the_engine_answers_as_the_reference_generates(case: Case, tmp_path: Path, agree: Agree, equal: Agree) -> None:
    reference = build(case)
    reference.model.save_pretrained(tmp_path)
    ours = load(
        tmp_path,
        decode_sampling_strategy="greedy",
        num_generations=1,
        max_slots=4,  # fewer than prompts, so that slots are used again
        decode_burst=5,
        max_prefill_predict_length=PROMPT,
        max_target_length=PROMPT + COMPLETION,
    )
    engine = OfflineEngine(ours.config, ours.weights, special=SPECIAL)
    rng = np.random.default_rng(case.seed)
    audio = random_audio(rng, case.spec.audio.mel_bins, FRAMES)
    prompts = random_prompts(rng, case.spec.decoder.vocab, FRAMES)
    results = engine.batch_inference(
        [
            InputData(
                id=str(i),
                tokens=np.asarray(prompt, np.int32),
                true_length=len(prompt),
                audio_features=audio.features[i, :, : FRAMES[i]],
            )
            for i, prompt in enumerate(prompts)
        ]
    )
    for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        clip = AudioBatch(audio.features[i : i + 1, :, : FRAMES[i]], audio.frames[i : i + 1])
        tokens, logits = reference.generate(prompt, clip, COMPLETION)
        ranked = np.sort(logits, axis=-1)
        doubtful = np.flatnonzero(ranked[:, -1] - ranked[:, -2] <= MARGIN)
        clear = int(doubtful[0]) if len(doubtful) else len(tokens)
        answer = result.completions[0]
        equal("greedy tokens", answer.token_ids[:clear], np.asarray(tokens[:clear]))
        log_probs = torch.tensor(logits).log_softmax(-1).numpy()[np.arange(clear), tokens[:clear]]
        agree("log-probabilities while sampling", answer.logprobs[:clear], log_probs, scale=1.0)
        if clear == len(tokens):
            assert len(answer.token_ids) == len(tokens)
