"""The other side: transformers' Qwen3-Omni thinker, with the same weights, in torch."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import transformers
from reference_work import FAMILY, TEMPERATURE, VOCAB, Work, requests, wanted_tokens
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3OmniMoeThinkerForConditionalGeneration
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


def publish_decoder(folder: str, out: str) -> dict[str, Any]:
    """Write the thinker's decoder as a causal language model, which is what trainers of text take."""
    thinker = load(folder)
    sizes = {key: value for key, value in thinker.config.text_config.to_dict().items() if key != "model_type"}
    rotary = {
        "rope_type": "default",
        "rope_theta": sizes["rope_parameters"]["rope_theta"],
    }  # one position for each token
    endless = {"eos_token_id": None, "pad_token_id": None}
    decoder = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, "rope_parameters": rotary, **endless}))
    decoder.model.load_state_dict(thinker.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(thinker.lm_head.state_dict())
    decoder.save_pretrained(out)
    return {}


def versions() -> dict[str, Any]:
    """Of what this side stands on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "trl": version("trl")}


def _start() -> Mapping[str, Job]:
    return {"rollout": rollout, "publish_decoder": publish_decoder, "versions": versions}


if __name__ == "__main__":
    serve(_start)
