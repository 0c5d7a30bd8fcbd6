"""A soak of the engine: many short requests of random lengths, of which some are at fault and some are cancelled.

    python benchmarks/soak.py [--requests 20000]

Every request must have one result, what is answered must be what the engine answers alone, and memory must not grow.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reference_work import SIZES

from audio_grpo.audio import audio_token_count
from audio_grpo.config import Config
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import initialize
from audio_grpo.model.thinker import thinker_table
from audio_grpo.rollout import OfflineEngine
from audio_grpo.rollout.generation import CANCELLED
from audio_grpo.types import InputData, RequestResult, SpecialTokens

AUDIO_PAD, VOCAB, LONGEST = 5, 512, 24
SPECIAL = SpecialTokens(
    audio_pad=AUDIO_PAD,
    audio_start=3,
    audio_end=4,
    im_start=1,
    im_end=2,
    pad=0,
    stop=(2,),
    never_sampled=((0, 2), (3, 6)),
)
CLIPS = 64
"""Different ones; requests take them by turns."""
WARM_UP = 200
"""Requests after which all programs are compiled."""
AT_FAULT, CANCELLED_SHARE, CHECKED = 0.01, 0.05, 50


def main() -> None:
    """Soak the engine and print what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    print(json.dumps(soak(parser.parse_args().requests), indent=1))


def soak(count: int) -> dict[str, Any]:
    """Answer `count` requests in one stream.

    Raises:
        AssertionError: a result is missing, comes twice, or is wrong.
    """
    engine, rng = _engine(), np.random.default_rng(0)
    requests, wrong = _requests(count, rng)
    limits = rng.integers(1, LONGEST + 1, count).tolist()
    results: dict[int, RequestResult] = {}
    asked: set[int] = set()
    every = max(1, count // CHECKED)
    memory: list[int] = []
    engine.batch_inference(requests[:WARM_UP], max_new_tokens=limits[:WARM_UP])
    stream = engine.stream(requests, max_new_tokens=limits)
    started = time.perf_counter()
    for index, result in stream:
        assert index not in results, f"request {index} has two results"
        _check(result, requests[index], limits[index], index in wrong, index in asked)
        # The others' tokens are let go, or they alone would fill the memory.
        results[index] = result if index % every == 0 else replace(result, completions=())
        if rng.random() < CANCELLED_SHARE:
            target = int(rng.integers(count))
            if target not in results:
                asked.add(target)
            stream.cancel(target)
        if len(results) % max(1, count // 20) == 0:
            memory.append(_resident_bytes())
    seconds = time.perf_counter() - started
    stats = engine.last_stats
    assert results.keys() == set(range(count)), f"{count - len(results)} requests have no result"
    chosen = [i for i, result in results.items() if i % every == 0 and result.error is None]
    _check_alone(engine, requests, limits, chosen, results)
    return {
        "requests": count,
        "at_fault": len(wrong),
        "cancelled": sum(result.error == CANCELLED for result in results.values()),
        "seconds": round(seconds, 1),
        "tokens": stats.tokens,
        "utilisation": round(stats.utilisation, 4),
        "bursts": stats.bursts,
        "resident_mib": [size >> 20 for size in memory],
        "growth_after_warm_up_mib": round((memory[-1] - memory[0]) / (1 << 20), 1),
    }


def _engine() -> OfflineEngine:
    sizes = {"emb_dim": 64, "num_query_heads": 4, "num_kv_heads": 2, "head_dim": 16, "moe_mlp_dim": 32}
    tower = {
        "d_model_for_audio": 32,
        "encoder_ffn_dim_for_audio": 64,
        "encoder_attention_heads_for_audio": 2,
        "downsample_hidden_size_for_audio": 8,
    }
    lengths = {"max_prefill_predict_length": 24, "max_target_length": 24 + LONGEST, "num_generations": 2}
    more = {"vocab_size": VOCAB, "max_slots": 32, "decode_burst": 8}
    config = Config.model_validate({**SIZES, **sizes, **tower, **lengths, **more})
    table = thinker_table(thinker_spec(config))
    weights = jax.jit(lambda key: initialize(table, key, jnp.float32))(jax.random.key(0))
    return OfflineEngine(config, weights, special=SPECIAL)


def _requests(count: int, rng: np.random.Generator) -> tuple[list[InputData], set[int]]:
    """Requests, and which of them have a placeholder too many."""
    clips = [rng.normal(size=(128, frames)).astype(np.float32) for frames in rng.integers(5, 100, CLIPS)]
    wrong = {int(i) for i in rng.choice(count, max(1, int(AT_FAULT * count)), replace=False)}
    requests = []
    for i in range(count):
        clip = clips[i % CLIPS]
        audible = int(audio_token_count(clip.shape[1])) + (i in wrong)
        tokens = np.asarray([1, 7, *[AUDIO_PAD] * audible, *rng.integers(6, VOCAB, rng.integers(1, 7))], np.int32)
        requests.append(InputData(id=f"r{i}", tokens=tokens, true_length=len(tokens), audio_features=clip))
    return requests, wrong


def _check(result: RequestResult, request: InputData, limit: int, wrong: bool, asked: bool) -> None:
    """One result, by itself; `asked` is whether it was to be cancelled."""
    failed = wrong or result.error == CANCELLED
    assert result.id == request.id
    assert (result.error is not None) == failed and (len(result.completions) == 2) != failed, result
    assert result.error != CANCELLED or asked, f"{request.id} was not to be cancelled"
    assert all(1 <= len(completion.token_ids) <= limit for completion in result.completions)


def _check_alone(
    engine: OfflineEngine,
    requests: list[InputData],
    limits: list[int],
    chosen: list[int],
    results: dict[int, RequestResult],
) -> None:
    """Some results, by answering the same requests without the others."""
    again = engine.batch_inference([requests[i] for i in chosen], max_new_tokens=[limits[i] for i in chosen])
    for i, result in zip(chosen, again, strict=True):
        for a, b in zip(results[i].completions, result.completions, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist(), f"request {i} was answered otherwise alone"


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
