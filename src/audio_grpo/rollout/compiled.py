"""The engine's programs for one model on one mesh, each compiled when it is first called."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
from jax.sharding import Mesh

from audio_grpo.model.spec import ThinkerSpec
from audio_grpo.rollout import programs
from audio_grpo.rollout.settings import EngineSettings, WorkloadShape
from audio_grpo.rollout.sharding import report_sharding, state_sharding
from audio_grpo.rollout.state import DecodeState, empty_state
from audio_grpo.types import SpecialTokens


class EnginePrograms:
    """Jitted programs; arguments are those of the functions in `rollout.programs`."""

    def __init__(self, spec: ThinkerSpec, settings: EngineSettings, special: SpecialTokens, mesh: Mesh) -> None:
        self._spec = replace(spec, router_replay=settings.router_replay)
        self._settings, self._special, self._mesh = settings, special, mesh

    @cached_property
    def prefill(self) -> Callable[..., Any]:
        """(weights, state, new) → state."""
        program = partial(programs.prefill_rows, self._spec, audio_pad=self._special.audio_pad)
        return jax.jit(program, donate_argnums=1, out_shardings=self.state_sharding)

    @cached_property
    def burst(self) -> Callable[..., Any]:
        """(fewest, weights, allowed, state, queue) → state and report."""
        sizes = (self._settings.sampling, self._special.stop, self._settings.burst)
        program = partial(programs.decode_burst, self._spec, *sizes)
        shardings = (self.state_sharding, report_sharding(self._mesh, router_replay=self._spec.router_replay))
        return jax.jit(program, static_argnums=0, donate_argnums=3, out_shardings=shardings)

    @cached_property
    def narrow(self) -> Callable[..., Any]:
        """(slots, parts, count) → slots."""
        return jax.jit(programs.narrow_slots, static_argnums=(1, 2), out_shardings=self.state_sharding.slots)

    def empty_state(self, shape: WorkloadShape) -> DecodeState:
        """A state in which nothing decodes."""
        return self._empty(shape)

    def abstract_state(self, shape: WorkloadShape) -> DecodeState:
        """Shapes, dtypes and shardings of that state, without its data."""
        state = jax.eval_shape(partial(self._build_state, shape))
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, self.state_sharding
        )

    @cached_property
    def _empty(self) -> Callable[..., Any]:
        return jax.jit(self._build_state, static_argnums=0, out_shardings=self.state_sharding)

    def _build_state(self, shape: WorkloadShape) -> DecodeState:
        return empty_state(
            self._spec,
            parts=shape.parts,
            rows=shape.rows,
            slots=shape.slots,
            generations=shape.generations,
            prompt_length=self._settings.prompt_length,
            length=self._settings.completion_length,
        )

    @cached_property
    def state_sharding(self) -> DecodeState:
        """A sharding for each array of the state."""
        return state_sharding(self._mesh, router_replay=self._spec.router_replay)
