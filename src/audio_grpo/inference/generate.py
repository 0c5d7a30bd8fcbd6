"""Completions for a manifest's rows."""

from collections.abc import Sequence
from typing import Any

from audio_grpo.errors import UserError
from audio_grpo.inference.model import OpenModel
from audio_grpo.inference.requests import by_bucket, read_manifest
from audio_grpo.rollout import EngineSettings, OfflineEngine, Sampling
from audio_grpo.types import InputData, RequestResult


def answer(
    model: OpenModel,
    requests: Sequence[InputData],
    *,
    generations: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[RequestResult]:
    """Answer requests of any lengths, in their order; temperature 0 takes the likeliest token.

    Raises:
        UserError: a request can not be answered.
    """
    sampling = Sampling(greedy=temperature == 0, temperature=temperature or 1.0)
    results: dict[int, RequestResult] = {}
    for length, indices in by_bucket([request.true_length for request in requests]):
        settings = EngineSettings(
            prompt_length=length,
            completion_length=max_new_tokens,
            generations=generations,
            max_slots=model.config.max_slots,
            burst=model.config.decode_burst,
            sampling=sampling,
            seed=seed,
        )
        engine = OfflineEngine(model.config, model.weights, mesh=model.mesh, special=model.special, settings=settings)
        answers = engine.batch_inference([requests[i] for i in indices])
        for result in answers:
            if result.error is not None:
                raise UserError(result.error)
        results |= dict(zip(indices, answers, strict=True))
    return [results[i] for i in range(len(requests))]


def generate(
    model: OpenModel,
    manifest: str,
    *,
    num_generations: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One result for each row: `{"completions": [{"token_ids", "logprobs", "text", "finish_reason"}]}`.

    `text` is null where the checkpoint has no tokenizer.
    """
    rows = read_manifest(model, manifest)
    results = answer(
        model,
        [row.request for row in rows],
        generations=num_generations,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    return [{"completions": [as_record(model, completion) for completion in r.completions]} for r in results]


def as_record(model: OpenModel, completion: Any) -> dict[str, Any]:
    """A completion as JSON."""
    ids = completion.token_ids.tolist()
    text = None if model.tokenizer is None else model.tokenizer.decode(ids, skip_special_tokens=True)
    return {
        "token_ids": ids,
        "logprobs": [float(x) for x in completion.logprobs],
        "text": text,
        "finish_reason": completion.finish_reason,
    }
