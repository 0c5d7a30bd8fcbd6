"""Where a run's weights come from: a published folder, runs of ours, or chance."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from jaxtyping import Array

from audio_grpo.config import Config, load_config
from audio_grpo.errors import UserError
from audio_grpo.model.checkpoint import read_published, spec_from_published
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.table import Table, initialize
from audio_grpo.training.checkpoints import latest_step, latest_weights
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import Session

PHASES = ("sft", "grpo")
"""Phases of a run in their order; a later one starts from the weights of the one before."""


class RunWeights(NamedTuple):
    """All weights of a run, and which they are."""

    weights: dict[str, Array]
    stage: str
    """The last phase that changed them; "start" where none has."""
    step: int
    """Updates done in that phase."""
    trained: frozenset[str]
    """Keys of the weights that a phase has changed since the published checkpoint or the random start."""
    published: Path | None
    """The published checkpoint that it all began with; None for random weights."""


class _Origin(NamedTuple):
    """What a run departs from: the end of its chain of `load_parameters_path`."""

    published: Path | None
    seed: int
    runs: tuple[RunFolder, ...]
    """Runs in between, the oldest first."""


def starting_weights(session: Session, phase: str) -> dict[str, Array]:
    """All weights from which `phase` of the configured run starts, before any update of its own.

    Raises:
        UserError: `load_parameters_path` is nothing to start from, or another model.
    """
    config = session.config
    origin = _origin(config)
    run = RunFolder(epath.Path(config.base_output_directory).expanduser() / config.run_name)
    return {**_first(session, origin), **_trained(session, origin.runs), **_of_phases(session, run, _before(phase))}


def run_weights(session: Session, run: RunFolder) -> RunWeights:
    """All weights of a run after its newest checkpoint; `session` is that of the run's own configuration."""
    origin = _origin(session.config)
    steps = {phase: latest_step(run.checkpoints / phase) for phase in PHASES}
    stage = next((phase for phase in reversed(PHASES) if steps[phase]), "start")
    trained = _trained(session, (*origin.runs, run))
    weights = {**_first(session, origin), **trained}
    return RunWeights(weights, stage, steps.get(stage, 0), frozenset(trained), origin.published)


def _before(phase: str) -> Sequence[str]:
    return PHASES[: PHASES.index(phase)]


def _origin(config: Config) -> _Origin:
    path = config.load_parameters_path
    if path is None:
        return _Origin(None, config.seed, ())
    folder = epath.Path(path).expanduser()
    run = RunFolder(folder)
    if run.config_path.exists():
        source = load_config(str(run.config_path))
        _check_sizes(path, _sizes(source), _sizes(config))
        before = _origin(source)
        return before._replace(runs=(*before.runs, run))
    if (folder / "config.json").exists():
        _check_sizes(path, spec_from_published(Path(folder)).settings, config.model_dump())
        return _Origin(Path(folder), config.seed, ())
    raise UserError(
        f"load_parameters_path {path} holds neither a run (config.yml) nor a published checkpoint (config.json)."
    )


def _sizes(config: Config) -> dict[str, Any]:
    spec = thinker_spec(config)
    return {"audio": spec.audio, "decoder": spec.decoder}


def _check_sizes(path: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    differing = [f"{key} is {value} there and {ours[key]} here" for key, value in theirs.items() if value != ours[key]]
    if differing:
        raise UserError(
            f"load_parameters_path {path} is another model than the configuration's: {'; '.join(differing)}. Give the "
            "model_name that belongs to it."
        )


def _first(session: Session, origin: _Origin) -> dict[str, Array]:
    published = origin.published
    if published is None:
        return _random(session, session.table, origin.seed)
    weights = read_published(published, session.base, session.mesh, session.weight_dtype)
    return {**weights, **_random(session, session.adapters, origin.seed)}


def _random(session: Session, table: Table, seed: int) -> dict[str, Array]:
    draw = partial(initialize, table, dtype=session.weight_dtype)
    shardings = {key: session.shardings[key] for key in table}
    return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))


def _trained(session: Session, runs: Sequence[RunFolder]) -> dict[str, Array]:
    weights: dict[str, Array] = {}
    for run in runs:
        weights |= _of_phases(session, run, PHASES)
    return weights


def _of_phases(session: Session, run: RunFolder, phases: Sequence[str]) -> dict[str, Array]:
    weights: dict[str, Array] = {}
    for phase in phases:
        weights |= latest_weights(run.checkpoints / phase, session.shardings, session.weight_dtype)
    return weights
