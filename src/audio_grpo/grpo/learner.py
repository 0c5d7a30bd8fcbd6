"""The learner's compiled programs: scoring, gradients of a part of a batch, and the update."""

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, UInt32

from audio_grpo.grpo.expert_load import with_experts
from audio_grpo.grpo.fused_loss import LogitsSettings, LossFn, fused_loss
from audio_grpo.grpo.log_probs import TokenScores, compute_log_probs
from audio_grpo.model.lora import drop_inputs
from audio_grpo.model.parts import by_part
from audio_grpo.model.spec import ThinkerSpec
from audio_grpo.model.table import Weights
from audio_grpo.model.thinker import group_forward, hear, output_head
from audio_grpo.parallel.activations import MANY_TOKENS, Placement
from audio_grpo.types import AudioBatch, GroupBatch

Heard = AudioBatch | Float[Array, "B A D"]
"""Clips to be heard within a program, so that gradients reach the tower, or embeddings heard before."""

_LITTLE_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""Has the CPU's compiler order operations for little memory. Its default is concurrency, which takes more and saves
no time: a matrix product keeps all cores busy by itself. Gradients are where a step's memory is."""


class TrainState(NamedTuple):
    """What training changes; everything else is frozen."""

    step: Array
    """Updates done."""
    skipped: Array
    """Updates skipped since."""
    trainable: dict[str, Array]
    """Weights in the run's weight dtype."""
    master: dict[str, Array] | None
    """The same in float32, where the weight dtype is narrower: small updates would be lost in rounding."""
    optimizer: optax.OptState


class UpdateReport(NamedTuple):
    """What an update tells."""

    norm: Float[Array, ""]
    """Of the gradient before clipping."""
    norms: dict[str, Float[Array, ""]]
    """The same of each part of the model that learns, see `model.parts`."""
    finite: dict[str, Bool[Array, ""]]
    """By what was looked at, whether it held neither NaN nor infinity."""


def init_train_state(trainable: dict[str, Array], optimizer: optax.GradientTransformation) -> TrainState:
    """Start of a run."""
    narrow = any(value.dtype != jnp.float32 for value in trainable.values())
    master = {key: value.astype(jnp.float32) for key, value in trainable.items()} if narrow else None
    moments = optimizer.init(trainable if master is None else master)
    return TrainState(jnp.int32(0), jnp.int32(0), trainable, master, moments)


class Learner:
    """Programs over one model and one loss."""

    def __init__(
        self,
        spec: ThinkerSpec,
        optimizer: optax.GradientTransformation,
        loss_fn: LossFn,
        *,
        audio_pad: int,
        temperature: float,
        chunk_bytes: int,
        lora_dropout: float = 0.0,
        router_aux_loss_coef: float = 0.0,
        shardings: TrainState | None = None,
    ) -> None:
        """`shardings` has one for each array of the state; gradients and updates keep to them.

        `lora_dropout` is the share of their inputs that adapters leave out when gradients are taken;
        `router_aux_loss_coef` weighs the experts' balance in the loss of each part of a batch.
        """
        self._spec = spec
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._audio_pad = audio_pad
        place = Placement(spec.mesh, MANY_TOKENS)
        self._logits = LogitsSettings(temperature=temperature, chunk_bytes=chunk_bytes, place=place)
        self._compiler_options = _LITTLE_MEMORY if place.platform == "cpu" else None
        self._lora_dropout = lora_dropout
        self._router_aux_loss_coef = router_aux_loss_coef
        # Left to itself, the compiler places some results elsewhere, and each program is compiled again for them.
        self._state_shardings = shardings
        self._gradient_shardings = None if shardings is None else shardings.trainable

    def start(self, trainable: dict[str, Array]) -> TrainState:
        """State before the first update."""
        initialize = partial(init_train_state, optimizer=self._optimizer)
        return jax.jit(initialize, out_shardings=self._state_shardings)(trainable)

    def score(self, weights: Weights, batch: GroupBatch, heard: Heard) -> TokenScores:
        """Log-probabilities of the batch's completions."""
        return self.score_program(weights, batch, heard)

    def gradients(
        self,
        trainable: Weights,
        frozen: Weights,
        batch: GroupBatch,
        heard: Heard,
        dropout_seed: np.uint32 | None = None,
    ) -> tuple[dict[str, Array], Any]:
        """Gradients with respect to the trainable weights and what the loss reports.

        `dropout_seed` decides what adapters leave out; without one they leave out nothing.
        """
        return self.gradients_program(trainable, frozen, batch, heard, dropout_seed)

    def add(self, a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
        """Sum of two parts' gradients."""
        return self.add_program(a, b)

    def update(
        self, state: TrainState, gradients: dict[str, Array], checked: Mapping[str, Float[Any, "..."]]
    ) -> tuple[TrainState, UpdateReport]:
        """One optimizer step, unless there is a NaN or an infinity in the gradients or in what else is to be checked.

        A step that is skipped changes neither weights nor moments, and is counted in the state.
        """
        return self.apply_program(state, gradients, checked)

    def abstract_state(self, trainable: dict[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Shapes, dtypes and shardings of the state of abstract weights."""
        state = jax.eval_shape(partial(init_train_state, optimizer=self._optimizer), trainable)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, self._state_shardings
        )

    @cached_property
    def score_program(self) -> Any:
        """(weights, batch, heard) → scores."""
        return jax.jit(self._scores)

    @cached_property
    def gradients_program(self) -> Any:
        """(trainable, frozen, batch, heard, seed of dropout) → gradients and the loss's report."""

        def loss(
            trainable: Weights, frozen: Weights, batch: GroupBatch, heard: Heard, seed: UInt32[Array, ""] | None
        ) -> tuple[Array, Any]:
            if seed is not None:
                trainable = drop_inputs(trainable, jax.random.key(seed), self._lora_dropout)
            weights = {**frozen, **trainable}
            hidden, load = group_forward(
                self._spec,
                weights,
                batch.prompts,
                self._embeddings(weights, heard),
                batch.completion_tokens,
                self._audio_pad,
                batch.routes,
                batch.mask,
            )
            loss, aux = fused_loss(hidden, output_head(weights), batch, self._loss_fn, self._logits)
            return with_experts(loss, aux, load, self._router_aux_loss_coef)

        def program(
            trainable: Weights, frozen: Weights, batch: GroupBatch, heard: Heard, seed: UInt32[Array, ""] | None
        ) -> tuple[dict[str, Array], Any]:
            gradients, aux = jax.grad(loss, has_aux=True)(trainable, frozen, batch, heard, seed)
            return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), aux

        return jax.jit(program, out_shardings=(self._gradient_shardings, None), compiler_options=self._compiler_options)

    @cached_property
    def add_program(self) -> Any:
        """(gradients, gradients) → their sum."""
        return jax.jit(partial(jax.tree.map, jnp.add), donate_argnums=0)

    @cached_property
    def apply_program(self) -> Any:
        """(state, gradients, checked) → state and report."""
        return jax.jit(self._applied, donate_argnums=0, keep_unused=True, out_shardings=(self._state_shardings, None))

    def _scores(self, weights: Weights, batch: GroupBatch, heard: Heard) -> TokenScores:
        return compute_log_probs(
            self._spec,
            weights,
            batch.prompts,
            self._embeddings(weights, heard),
            batch.completion_tokens,
            audio_pad=self._audio_pad,
            temperature=self._logits.temperature,
            routes=batch.routes,
        )

    def _embeddings(self, weights: Weights, heard: Heard) -> Float[Array, "B A D"]:
        return hear(self._spec, weights, heard) if isinstance(heard, AudioBatch) else heard

    def _applied(
        self, state: TrainState, gradients: dict[str, Array], checked: Mapping[str, Float[Any, "..."]]
    ) -> tuple[TrainState, UpdateReport]:
        report = _report(gradients, checked)

        def done() -> TrainState:
            precise = state.trainable if state.master is None else state.master
            updates, optimizer = self._optimizer.update(gradients, state.optimizer, precise)
            precise: Any = optax.apply_updates(precise, updates)
            trainable = jax.tree.map(lambda value, old: value.astype(old.dtype), precise, state.trainable)
            master = None if state.master is None else precise
            return TrainState(state.step + 1, jnp.zeros_like(state.skipped), trainable, master, optimizer)

        # A branch, because a choice between old and new arrays needs room for both.
        good = jnp.stack(list(report.finite.values())).all()
        return jax.lax.cond(good, done, lambda: state._replace(skipped=state.skipped + 1)), report


def _report(gradients: dict[str, Array], checked: Mapping[str, Float[Any, "..."]]) -> UpdateReport:
    norm = optax.tree_utils.tree_norm(gradients)
    parts = {part: [gradients[key] for key in keys] for part, keys in by_part(gradients).items()}
    norms = {part: optax.tree_utils.tree_norm(members) for part, members in parts.items()}
    finite = {name: jnp.isfinite(value).all() for name, value in checked.items()}
    return UpdateReport(norm, norms, {**finite, "grad_norm": jnp.isfinite(norm)})
