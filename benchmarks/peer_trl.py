"""A whole GRPO iteration by TRL's own trainer, of which each step waits until it is asked for."""

import time
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peer import THREADS
from peer_iteration import BETA, CLIPPING, LEARNING_RATE, SEQUENCES
from reference_work import FAMILY, TEMPERATURE, VOCAB, Work, requests, rewards
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from worker import Talk, peak_bytes

from audio_grpo.text import family_special_tokens


class Turns(TrainerCallback):
    """Holds each step back until it is asked for, and tells how it was."""

    def __init__(self, talk: Talk) -> None:
        self._talk, self._asked = talk, iter(talk)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Sampling comes after this, for it is part of the step."""
        next(self._asked)
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer is done."""
        self._seconds = time.perf_counter() - self._started

    def on_log(self, *_: Any, logs: Mapping[str, float], **__: Any) -> None:
        """Comes after each step, and once more after the last."""
        if "grad_norm" in logs:
            norm, entropy = float(logs["grad_norm"]), float(logs["entropy"])
            told = {"seconds": self._seconds, "peak": peak_bytes(), "gradient_norm": norm, "entropy": entropy}
            self._talk.answer(told)


def create_trainer(folder: str, work: Work, steps: int, talk: Talk, out: str) -> GRPOTrainer:
    """TRL's trainer of a decoder that lies in `folder`; `out` is for its files, of which there are none."""
    special = family_special_tokens(FAMILY, VOCAB)
    tokenizer, prompts = numbers(), [prompt.tokens.tolist() for prompt in requests(work, special.audio_pad)]
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    assert tokenizer(texts)["input_ids"] == prompts
    sequences = min(SEQUENCES, work.completions)
    args = GRPOConfig(
        out,
        max_steps=steps,
        per_device_train_batch_size=sequences,
        gradient_accumulation_steps=work.completions // sequences,
        num_generations=work.generations,
        max_completion_length=work.tokens,
        temperature=TEMPERATURE,
        beta=BETA,
        loss_type="grpo",
        router_aux_loss_coef=0.0,
        learning_rate=LEARNING_RATE,
        adam_beta2=0.99,
        max_grad_norm=CLIPPING,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=folder,
        reward_funcs=even_tokens,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[Turns(talk)],
    )


def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward, as TRL calls it."""
    return rewards(np.asarray(completion_ids)).tolist()


def numbers() -> PreTrainedTokenizerFast:
    """Each token but the first is written as its number; the one that ends a completion is none of the model's."""
    tokenizer = Tokenizer(WordLevel({"<pad>": 0} | {str(token): token for token in range(1, VOCAB)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", padding_side="left"
    )


def main() -> None:
    """Train as many steps as are asked for."""
    torch.set_num_threads(THREADS)
    talk = Talk()
    given = talk.arguments
    with TemporaryDirectory() as out:
        create_trainer(given["folder"], Work(**given["work"]), given["steps"], talk, out).train()


if __name__ == "__main__":
    main()
