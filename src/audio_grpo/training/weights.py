"""Where a run's weights come from: a published folder, a run of ours, or chance."""

from functools import partial
from typing import NamedTuple

import jax
from etils import epath
from jaxtyping import Array

from audio_grpo.config import load_config
from audio_grpo.errors import UserError
from audio_grpo.model.table import initialize
from audio_grpo.training.checkpoints import latest_step, latest_weights
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import Session

PHASES = ("sft", "grpo")
"""Phases of a run in their order; a later one starts from the weights of the one before."""


def starting_weights(session: Session, phase: str) -> dict[str, Array]:
    """All weights from which `phase` of the configured run starts, before any update of its own."""
    config = session.config
    run = RunFolder(epath.Path(config.base_output_directory).expanduser() / config.run_name)
    earlier = PHASES[: PHASES.index(phase)]
    return {**_base(session), **_trained(session, run, earlier)}


class RunWeights(NamedTuple):
    """All weights of a run, and which they are."""

    weights: dict[str, Array]
    stage: str
    """The last phase that changed them; "start" where none has."""
    step: int
    """Updates done in that phase."""


def run_weights(session: Session, run: RunFolder) -> RunWeights:
    """All weights of a run after its newest checkpoint; `session` is that of the run's own configuration."""
    steps = {phase: latest_step(run.checkpoints / phase) for phase in PHASES}
    stage = next((phase for phase in reversed(PHASES) if steps[phase]), "start")
    weights = {**_base(session), **_trained(session, run, PHASES)}
    return RunWeights(weights, stage, steps.get(stage, 0))


def _base(session: Session) -> dict[str, Array]:
    path = session.config.load_parameters_path
    if path is None:
        draw = partial(initialize, session.table, dtype=session.weight_dtype)
        return jax.jit(draw, out_shardings=session.shardings)(jax.random.key(session.config.seed))
    folder = epath.Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"load_parameters_path {path} does not exist: give a published checkpoint or a run's folder.")
    run = RunFolder(folder)
    if run.config_path.exists():
        return _weights_of_run(session, run)
    raise UserError(f"load_parameters_path {path} holds neither a run (config.yml) nor a published checkpoint.")


def _weights_of_run(session: Session, run: RunFolder) -> dict[str, Array]:
    origin = load_config(str(run.config_path))
    source = Session(origin, session.mesh, session.spec, session.table, session.tokenizer, session.special)
    return run_weights(source, run).weights


def _trained(session: Session, run: RunFolder, phases: tuple[str, ...]) -> dict[str, Array]:
    weights: dict[str, Array] = {}
    for phase in phases:
        weights |= latest_weights(run.checkpoints / phase, session.shardings, session.weight_dtype)
    return weights
