"""Our side: rollouts and a learner's iterations of the reference work, and what matrix products cost here."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matmuls import decode_matmuls
from reference_work import FAMILY, SIZES, TEMPERATURE, VOCAB, Work, requests
from worker import Job, serve, timed

from audio_grpo.config import Config
from audio_grpo.model.checkpoint import create_published
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import initialize
from audio_grpo.model.thinker import thinker_table
from audio_grpo.rollout import OfflineEngine
from audio_grpo.text import family_special_tokens
from audio_grpo.types import SpecialTokens


def config_of(work: Work, **changes: Any) -> Config:
    """Settings as a user has them, but for the sizes of the reference work's thinker and of the work."""
    return Config.model_validate({**SIZES, **settings_of(work), **changes})


def settings_of(work: Work) -> dict[str, Any]:
    """A work's own part of a configuration."""
    return {
        "max_prefill_predict_length": work.prompt_tokens,
        "max_target_length": work.prompt_tokens + work.tokens,
        "num_generations": work.generations,
        "decode_sampling_temperature": TEMPERATURE,
        "max_slots": work.slots,
        "per_device_batch_size": work.prompts,
        **({"audio_max_seconds": work.seconds} if work.seconds else {}),
        "use_grpo": work.generations > 1,
    }


def special_of(work: Work) -> SpecialTokens:
    """The family's, with the stop tokens of the work."""
    return replace(family_special_tokens(FAMILY, VOCAB), stop=work.stop)


@cache
def random_weights() -> dict[str, jax.Array]:
    """Of the reference work's thinker."""
    table = thinker_table(thinker_spec(config_of(Work())))
    return jax.jit(lambda key: initialize(table, key, jnp.float32))(jax.random.key(0))


@cache
def _engine(work: Work) -> OfflineEngine:
    return OfflineEngine(config_of(work), random_weights(), special=special_of(work))


def publish(folder: str) -> dict[str, Any]:
    """Write the random thinker for the other side."""
    spec, special = thinker_spec(config_of(Work())), family_special_tokens(FAMILY, VOCAB)
    create_published(random_weights(), spec, Path(folder), family=FAMILY, special=special)
    return {}


def rollout(work: dict[str, Any], seed: int) -> dict[str, Any]:
    """Sample once; the first time that includes compilation."""
    asked = Work(**work)
    engine = _engine(asked)
    inputs = requests(asked, engine.special.audio_pad)
    sample = partial(engine.batch_inference, inputs, seed=seed, max_new_tokens=asked.limits)
    seconds, results = timed(sample)
    tokens = sum(len(completion.token_ids) for result in results for completion in result.completions)
    stats = engine.last_stats
    return {"seconds": seconds, "tokens": tokens, "stats": asdict(stats) | {"utilisation": stats.utilisation}}


def matmuls(rows: int) -> dict[str, Any]:
    """Seconds of one decode step's matrix products, by name."""
    return decode_matmuls(thinker_spec(config_of(Work())).decoder, rows)


def versions() -> dict[str, Any]:
    """Of what this side stands on."""
    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def _start() -> Mapping[str, Job]:
    return {"publish": publish, "rollout": rollout, "matmuls": matmuls, "versions": versions}


if __name__ == "__main__":
    serve(_start)
