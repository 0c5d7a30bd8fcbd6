"""Log-probabilities of given completions."""

from functools import partial
from typing import Any

import jax
import numpy as np

from audio_grpo.errors import UserError
from audio_grpo.grpo import compute_log_probs
from audio_grpo.inference.model import OpenModel
from audio_grpo.inference.requests import ManifestRow, bucket, by_bucket, read_manifest, token_ids
from audio_grpo.model.thinker import hear
from audio_grpo.types import AudioBatch, PromptBatch


def score(model: OpenModel, manifest: str, *, temperature: float = 1.0) -> list[dict[str, Any]]:
    """One result for each row: `{"logprobs": [...], "logprob": sum}` of its `completion_token_ids` or `text`.

    Text is scored as it stands, without a stop token.

    Raises:
        UserError: a row has neither or both of the two columns.
    """
    rows = read_manifest(model, manifest)
    completions = [_completion(model, row) for row in rows]
    program = jax.jit(partial(_score_one, model, temperature))
    results: dict[int, list[float]] = {}
    for prompt_length, indices in by_bucket([row.request.true_length for row in rows]):
        for i in indices:
            inputs = _padded(rows[i], completions[i], prompt_length, model)
            scores = np.asarray(program(model.weights, *inputs))
            results[i] = [float(x) for x in scores[: len(completions[i])]]
    return [{"logprobs": results[i], "logprob": float(np.sum(results[i]))} for i in range(len(rows))]


def _completion(model: OpenModel, row: ManifestRow) -> np.ndarray:
    ids = token_ids(row.values, "completion_token_ids", row.place, model.spec.decoder.vocab)
    text = row.values.get("text")
    if ids is not None:
        return ids
    if not isinstance(text, str) or not text:
        raise UserError(f"{row.place} has nothing to score: give text or completion_token_ids.")
    return np.asarray(model.require_tokenizer().encode(text), np.int32)


def _padded(
    row: ManifestRow, completion: np.ndarray, prompt_length: int, model: OpenModel
) -> tuple[PromptBatch, AudioBatch, np.ndarray]:
    request, features = row.request, row.request.audio_features
    assert features is not None
    tokens = np.full((1, prompt_length), model.special.pad, np.int32)
    tokens[0, : request.true_length] = request.tokens
    audio = np.zeros((1, features.shape[0], _frame_bucket(features.shape[1])), np.float32)
    audio[0, :, : features.shape[1]] = features
    targets = np.full((1, 1, bucket(len(completion))), model.special.pad, np.int32)
    targets[0, 0, : len(completion)] = completion
    lengths = np.asarray([request.true_length], np.int32), np.asarray([features.shape[1]], np.int32)
    return PromptBatch(tokens, lengths[0]), AudioBatch(audio, lengths[1]), targets


def _frame_bucket(frames: int) -> int:
    return bucket(-(-frames // 8)) * 8


def _score_one(
    model: OpenModel, temperature: float, weights: Any, prompts: PromptBatch, audio: AudioBatch, targets: Any
) -> jax.Array:
    scores = compute_log_probs(
        model.spec,
        weights,
        prompts,
        hear(model.spec, weights, audio),
        targets,
        audio_pad=model.special.audio_pad,
        temperature=temperature,
    )
    return scores.log_probs[0, 0]
