"""The other side: transformers' Qwen3-Omni thinker, with the same weights, in torch."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from reference_work import FAMILY, TEMPERATURE, VOCAB, Work, requests, wanted_tokens
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration
from worker import Job, serve, timed

from audio_grpo.text import family_special_tokens

THREADS = 2


@cache
def load(folder: str) -> Any:
    """The model that ours published."""
    torch.set_num_threads(THREADS)
    return Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def inputs_of(work: Work) -> dict[str, torch.Tensor]:
    """The work's prompts and clips as the model takes them; none is padded."""
    asked = requests(work, family_special_tokens(FAMILY, VOCAB).audio_pad)
    tokens = torch.tensor(np.stack([request.tokens for request in asked]), dtype=torch.long)
    features = torch.tensor(np.stack([request.audio_features for request in asked]))
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "input_features": features,
        "feature_attention_mask": torch.ones(features.shape[0], features.shape[2], dtype=torch.long),
    }


def rollout(folder: str, work: dict[str, Any], seed: int) -> dict[str, Any]:
    """Sample once, all completions together until the longest has ended."""
    torch.manual_seed(seed)
    asked = Work(**work)
    model, inputs = load(folder), inputs_of(asked)
    seconds, answers = timed(lambda: generate(model, inputs, asked))
    return {"seconds": seconds, "tokens": wanted_tokens(answers.numpy(), asked)}


def generate(model: Any, inputs: Mapping[str, torch.Tensor], work: Work) -> torch.Tensor:
    """Completion tokens [B·G, C]."""
    output = model.generate(
        **inputs,
        num_return_sequences=work.generations,
        max_new_tokens=max(work.limits),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        eos_token_id=list(work.stop) or None,
        pad_token_id=family_special_tokens(FAMILY, VOCAB).pad,
    )
    return output[:, inputs["input_ids"].shape[1] :]


def versions() -> dict[str, Any]:
    """Of what this side stands on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _start() -> Mapping[str, Job]:
    return {"rollout": rollout, "versions": versions}


if __name__ == "__main__":
    serve(_start)
