"""TRL's own GRPO and RLOO trainers, with a model, a sampler and rewards that give numbers stated beforehand.

Everything between these numbers and the loss is TRL's code, called as its training step calls it.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

PAD, STOP, WORD = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a model, a sampler and reward functions say of N completions, G for each prompt, of C tokens at most."""

    lengths: np.ndarray
    """Tokens of each completion, [N]."""
    stopped: np.ndarray
    """Whether a stop token came, [N]."""
    policy: np.ndarray
    """Log-probabilities of the policy that learns, [N, C]; those that follow are of others."""
    old: np.ndarray
    reference: np.ndarray
    sampler: np.ndarray
    entropy: np.ndarray
    """Of the policy at each token, [N, C]."""
    rewards: np.ndarray
    """What each of R functions pays, [N, R]."""
    generations: int

    @property
    def mask(self) -> np.ndarray:
        """True for a completion's tokens, [N, C]."""
        return np.arange(self.policy.shape[1]) < self.lengths[:, None]


@dataclass(frozen=True)
class Step:
    """What TRL makes of them."""

    loss: float
    gradient: np.ndarray
    """With respect to the policy's log-probabilities, [N, C]."""
    entropy_gradient: np.ndarray
    """With respect to the entropy, [N, C]."""
    advantages: np.ndarray
    """Of each completion, [N]."""
    metrics: dict[str, float]


def grpo(numbers: Numbers, **options: Any) -> Step:
    """A step of `GRPOTrainer` under options of `GRPOConfig`."""
    args = GRPOConfig(**_sizes(numbers), **options)
    trainer = _without_model(GRPOTrainer, args, numbers)
    policy, entropy = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (numbers.policy, numbers.entropy)
    )
    longest = numbers.lengths.max()
    old, reference = (torch.tensor(x[:, :longest]) for x in (numbers.old, numbers.reference))

    def scores(model: Any, *_: Any, compute_entropy: bool = False, **__: Any) -> tuple[Any, Any, None]:
        if compute_entropy:
            return policy[:, :longest], entropy[:, :longest], None
        return (reference if model is trainer.ref_model else old), None, None

    trainer._generate = lambda prompts: _sampled(numbers, prompts)
    trainer._get_per_token_logps_and_entropies = scores
    batch = trainer._generate_and_score_completions([{"prompt": "hear"}] * len(numbers.lengths))
    loss = trainer._compute_loss(trainer.model, batch)
    gradients = torch.autograd.grad(loss, (policy, entropy), allow_unused=True, materialize_grads=True)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return Step(loss.item(), *(each.numpy() for each in gradients), batch["advantages"].numpy(), metrics)


def rloo_advantages(numbers: Numbers) -> np.ndarray:
    """Those of `RLOOTrainer`, [N]."""
    trainer = _without_model(RLOOTrainer, RLOOConfig(**_sizes(numbers), beta=0.0), numbers)
    trainer._generate = lambda prompts: (sampled := _sampled(numbers, prompts))[:2] + sampled[3:4]
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (torch.tensor(numbers.old), None, None)
    return trainer._generate_and_score_completions([{"prompt": "hear"}] * len(numbers.lengths))["advantages"].numpy()


def _sizes(numbers: Numbers) -> dict[str, Any]:
    return {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": len(numbers.lengths),
        "num_generations": numbers.generations,
        "max_completion_length": numbers.policy.shape[1],
    }


def _without_model(kind: type[Any], args: Any, numbers: Numbers) -> Any:
    """A trainer with the attributes that its constructor derives from `args`, but no model, data or sampler."""
    trainer = kind.__new__(kind)
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    functions = [f"reward_{i}" for i in range(numbers.rewards.shape[1])]
    weights = [1.0] * len(functions) if args.reward_weights is None else args.reward_weights
    vars(trainer).update(
        vars(args),
        args=args,
        model=model,
        ref_model=SimpleNamespace(),
        accelerator=_Alone(),
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        current_gradient_accumulation_steps=1,
        reward_funcs=functions,
        reward_func_names=functions,
        reward_weights=torch.tensor(weights),
        eos_token_ids=[STOP],
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        environment_factories=None,
        environments=None,
        tools=None,
        chat_template_kwargs={},
        aux_loss_enabled=False,
        _entropy_bonus_enabled=getattr(args, "entropy_coef", 0.0) != 0,
        _is_vlm=False,
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    trainer._calculate_rewards = lambda *_: torch.tensor(numbers.rewards)
    return trainer


def _sampled(numbers: Numbers, prompts: list[str]) -> tuple[Any, ...]:
    completions = [
        [WORD] * (length - 1) + [STOP if stopped else WORD]
        for length, stopped in zip(numbers.lengths, numbers.stopped, strict=True)
    ]
    log_probs = [row[:length].tolist() for row, length in zip(numbers.sampler, numbers.lengths, strict=True)]
    return [[WORD]] * len(prompts), completions, None, completions, log_probs, {}, None, None


class _Alone:
    """An accelerator of one process."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    sync_gradients = True

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def reduce(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return values
