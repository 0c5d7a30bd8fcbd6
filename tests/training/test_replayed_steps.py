"""Experts chosen while sampling, on their way into the learner's programs."""

from functools import partial

import jax
import numpy as np
import pytest
from tiny_runs import kept_programs, metrics_of, tiny_config, with_tones

from audio_grpo.model.thinker import group_forward
from audio_grpo.training import setup_train_loop, train_loop
from audio_grpo.training.batches import join_parts
from audio_grpo.training.learning import learner_batch
from audio_grpo.training.loop import score, split
from audio_grpo.training.programs import run_programs
from audio_grpo.training.sampling import generate_completions

G = 2
GATE = "model.layers.*.mlp.gate.weight"
EXPERTS = {
    "num_decoder_layers": 2,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_mlp_dim": 24,
    "router_replay": True,
    "gradient_accumulation_steps": 2,
    "enable_checkpointing": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = with_tones(tmp_path_factory.mktemp("replayed"))
    with kept_programs(folder / "programs"):
        yield folder


@pytest.fixture(scope="module")
def sampled(folder):
    """A trainer, a rollout of its first batch, and what the learner makes of it, transcripts included."""
    trainer, engine = setup_train_loop(tiny_config(folder, inject_transcript=True, **EXPERTS))
    batch = next(trainer.data)
    rollout = generate_completions(trainer, engine, batch, 1)
    advantages = np.zeros((len(batch["id"]), G + 1), np.float32)
    return trainer, rollout, *learner_batch(trainer, batch, rollout, advantages)


def moved_router(trainer):
    """Weights with a router that would choose other experts than those that sampled."""
    gate = trainer.weights[GATE]
    noise = np.random.default_rng(0).normal(size=gate.shape).astype(np.float32)
    return trainer.weights | {GATE: gate + 0.3 * float(np.std(gate)) * noise}


def gap(rollout, log_probs):
    return np.abs(log_probs[:, :G] - rollout.log_probs)[rollout.mask].mean()


def test_the_plan_counts_the_routes_that_the_run_replays(sampled):
    trainer, _, groups, _ = sampled
    assert groups.routes.completions.shape[1] == groups.completion_tokens.shape[1] - 1 == G
    planned = {program.phase: program.arguments for program in run_programs(trainer.session)}
    for number in range(2):
        parts = list(split(trainer, groups))
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), parts[number])
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), planned["gradients"][2])


def test_each_part_of_a_batch_has_the_routes_of_its_own_tokens(sampled):
    trainer, _, groups, heard = sampled
    spec, pad = trainer.session.spec, trainer.session.special.audio_pad
    run = jax.jit(partial(group_forward, spec), static_argnums=4)

    def hidden(weights, replayed):
        parts = [
            run(weights, part.prompts, part_heard, part.completion_tokens, pad, part.routes if replayed else None)
            for part, part_heard in split(trainer, (groups, heard))
        ]
        return join_parts(trainer.session.mesh, [np.asarray(part.hidden) for part in parts])[:, :G][groups.mask[:, :G]]

    exact = hidden(trainer.weights, False)
    np.testing.assert_allclose(hidden(trainer.weights, True), exact, atol=1e-4)
    off = {replayed: np.abs(hidden(moved_router(trainer), replayed) - exact).mean() for replayed in (True, False)}
    assert off[False] > 2 * off[True]


def test_the_learners_scores_replay_what_was_sampled(sampled):
    trainer, rollout, groups, heard = sampled
    free, replayed = (
        gap(rollout, score(trainer, moved_router(trainer), groups._replace(routes=routes), heard))
        for routes in (None, groups.routes)
    )
    assert free > 2 * replayed


def test_a_run_replays_with_all_that_changes_a_batch(folder):
    """Dynamic sampling joins rollouts, the transcript has no routes, updates reuse them, and parts share them out."""
    changes = {"dynamic_sampling_max_rounds": 1, "inject_transcript": True, "num_iterations": 2}
    config = tiny_config(folder, run_name="all", steps=2, freeze_router_params=False, **changes, **EXPERTS)
    steps = metrics_of(train_loop(config))
    assert len(steps) == 2
    for metrics in steps:
        assert metrics["skipped_updates"] == 0
        assert metrics["grad_norm/router"] > 0
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-3
