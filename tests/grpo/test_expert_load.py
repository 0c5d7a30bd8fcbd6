from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.grpo.expert_load import balance_loss, load_metrics, with_experts
from audio_grpo.grpo.metrics import LossAux
from audio_grpo.model.router import Load
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.thinker import group_forward
from audio_grpo.types import PromptBatch
from small_model import AUDIO_PAD, random_weights, small_config

CONFIG = small_config(num_experts=6)
GATE = "model.layers.*.mlp.gate.weight"


def load_of(assigned, probabilities=None):
    counts = jnp.asarray(assigned, jnp.float32)
    given = counts if probabilities is None else jnp.asarray(probabilities, jnp.float32)
    return Load(counts, given, counts.sum(axis=1) / 2)


def told(load):
    return {name: metric.value() for name, metric in load_metrics(load).items()}


def test_an_even_load_is_one_and_the_worst_layer_counts():
    assert told(load_of([[2, 2, 2, 2], [2, 2, 2, 2]])) == {"router/load_max": 1, "router/unused_experts": 0}
    assert told(load_of([[2, 2, 2, 2], [4, 0, 4, 0]])) == {"router/load_max": 2, "router/unused_experts": 0.25}
    assert told(load_of([[4, 0, 4, 0], [1, 7, 0, 0]])) == {"router/load_max": 3.5, "router/unused_experts": 0.5}


def test_nothing_routed_is_no_load():
    assert told(load_of(np.zeros((2, 4)))) == {"router/load_max": 0, "router/unused_experts": 1}
    assert balance_loss(load_of(np.zeros((2, 4)))) == 0


def test_parts_of_a_batch_are_told_together():
    """Each part uses other experts; together they are used evenly."""
    parts = [LossAux(jnp.float32(0), load_metrics(load_of(x))) for x in ([[4, 4, 0, 0]], [[0, 0, 4, 4]])]
    assert parts[0].means()["router/load_max"] == 2
    assert parts[0].merge(parts[1]).means() == {"loss": 0, "router/load_max": 1, "router/unused_experts": 0}


def test_an_even_load_costs_k_and_a_lopsided_one_more():
    even, lopsided = [[3, 3, 3, 3]], [[6, 6, 0, 0]]
    assert balance_loss(load_of(even, [[1.5] * 4])) == pytest.approx(2)
    assert balance_loss(load_of(lopsided, [[3, 3, 0, 0]])) == pytest.approx(4)


def test_a_batchs_balance_loss_is_the_mean_of_its_parts():
    coefficient, parts = 0.3 / 2, []
    for load in (load_of([[6, 6, 0, 0]], [[3, 3, 0, 0]]), load_of([[3, 3, 3, 3]], [[1.5] * 4])):
        aux = LossAux(jnp.float32(1), {})
        loss, aux = with_experts(aux.loss, aux, load, coefficient)
        assert aux.loss == loss
        parts.append(aux)
    told = parts[0].merge(parts[1]).means()
    assert told["aux_loss"] == pytest.approx((4 + 2) / 2)
    assert told["loss"] == pytest.approx(1 + 1 + 0.3 * 3)
    assert told["router/load_max"] == pytest.approx(9 / 6)


def test_without_a_coefficient_or_without_experts_the_loss_stays_as_it_is():
    aux = LossAux(jnp.float32(2), {})
    assert with_experts(aux.loss, aux, None, 0.5) == (2, aux)
    loss, told = with_experts(aux.loss, aux, load_of([[6, 6, 0, 0]]), 0.0)
    assert loss == 2 and told.means() == {"loss": 2, "router/load_max": 2, "router/unused_experts": 0.5}


def test_the_loss_teaches_the_router_and_does_not_see_padding():
    config = small_config(num_experts=6, num_decoder_layers=1)
    spec, weights, rng = thinker_spec(config), random_weights(config), np.random.default_rng(0)
    lengths = np.asarray([3, 5], np.int32)
    prompts = PromptBatch(jnp.asarray(rng.integers(6, 200, (2, 5)), jnp.int32), jnp.asarray(lengths))
    completions = jnp.asarray(rng.integers(6, 200, (2, 3, 4)), jnp.int32)
    counted = jnp.arange(4) < rng.integers(1, 5, (2, 3))[..., None]
    heard = jnp.zeros((2, 0, spec.decoder.width))
    run = jax.jit(partial(group_forward, spec), static_argnums=4)

    def loss(gate, completions=completions):
        changed = weights | {GATE: gate}
        return balance_loss(run(changed, prompts, heard, completions, AUDIO_PAD, None, counted).load)

    gradient = jax.grad(loss)(weights[GATE])
    assert np.abs(gradient).max() > 1e-3
    step = weights[GATE] - 0.1 * gradient / np.abs(gradient).max()
    assert loss(step) < loss(weights[GATE])
    # What stands in the padding changes nothing.
    noise = jnp.where(counted, completions, 250 - completions)
    assert loss(weights[GATE], noise) == pytest.approx(float(loss(weights[GATE])), rel=1e-6)
