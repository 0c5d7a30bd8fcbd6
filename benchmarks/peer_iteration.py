"""What follows a rollout in torch: clips heard once, prompts repeated, logits of completion tokens only."""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peer import inputs_of, load
from reference_work import TEMPERATURE, Work, answers
from torch.nn.functional import cross_entropy
from worker import Job, peak_bytes, serve, timed

BETA = 0.04
LEARNING_RATE = 1e-6
CLIPPING = 1.0
SEQUENCES = 16
"""That go through the model together."""


class Learning:
    """A policy, its reference, its optimizer and one batch."""

    def __init__(self, folder: str, work: Work) -> None:
        self._work = work
        self._policy = load(folder)
        self._reference = deepcopy(self._policy).requires_grad_(False)
        self._inputs = inputs_of(work)
        self._policy.model.audio_tower.requires_grad_(False)
        self._policy.model.visual.requires_grad_(False)
        self._learned = [weight for weight in self._policy.parameters() if weight.requires_grad]
        settings = {"lr": LEARNING_RATE, "betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
        self._optimizer = torch.optim.AdamW(self._learned, **settings)
        tokens, advantages = answers(work)
        self._tokens = torch.tensor(tokens, dtype=torch.long).flatten(0, 1)
        self._advantages = torch.tensor(advantages).flatten()

    def learn(self) -> dict[str, Any]:
        """Reference scoring and policy update of given answers; clips are heard here, as `generate` keeps nothing."""
        scoring_seconds, reference = timed(self._reference_scores)
        peaks = {"scoring": peak_bytes()}
        update_seconds, norm = timed(partial(self._update, reference))
        peaks["update"] = peak_bytes()
        return {"scoring": scoring_seconds, "update": update_seconds, "gradient_norm": norm, "peaks": peaks}

    @torch.no_grad()
    def _reference_scores(self) -> torch.Tensor:
        clips = self._inputs["input_features"], self._inputs["feature_attention_mask"]
        heard = self._reference.model.get_audio_features(*clips).pooler_output
        self._heard = heard.view(self._work.prompts, -1, heard.shape[-1])
        parts = torch.arange(len(self._tokens)).split(SEQUENCES)
        return torch.cat([self._log_probs(self._reference, rows) for rows in parts])

    def _update(self, reference: torch.Tensor) -> float:
        for rows in torch.arange(len(self._tokens)).split(SEQUENCES):
            policy = self._log_probs(self._policy, rows)
            ratio = (policy - policy.detach()).exp()  # on-policy: clipping never binds
            difference = reference[rows] - policy
            kl = difference.exp() - difference - 1
            per_token = BETA * kl - ratio * self._advantages[rows, None]
            (per_token.sum() / self._tokens.numel()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._learned, CLIPPING)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def _log_probs(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [rows, C] of the given answers."""
        answers, prompts = self._tokens[rows], rows // self._work.generations
        ids = torch.cat([self._inputs["input_ids"][prompts], answers], 1)
        said = (ids == model.config.audio_token_id)[..., None]
        embedded = model.get_input_embeddings()(ids).masked_scatter(said, self._heard[prompts])
        mask = torch.ones_like(ids)
        hidden = model.model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        predicting = hidden[:, -answers.shape[1] - 1 : -1]
        logits = (model.lm_head(predicting) / TEMPERATURE).flatten(0, 1)
        return -cross_entropy(logits, answers.flatten(), reduction="none").view_as(answers)


def _start(folder: str, work: Mapping[str, Any]) -> Mapping[str, Job]:
    return {"learn": Learning(folder, Work(**work)).learn}


if __name__ == "__main__":
    serve(_start)
