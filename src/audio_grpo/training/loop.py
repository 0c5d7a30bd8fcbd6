"""What supervised and GRPO training share: set-up, the loop over steps, updates from a whole batch."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from audio_grpo.config import Config, to_yaml
from audio_grpo.data import create_audio_data_iterator
from audio_grpo.data.pipeline import prompts_per_step
from audio_grpo.errors import UserError
from audio_grpo.grpo import Learner, TrainState
from audio_grpo.parallel.mesh import batch_shards
from audio_grpo.parallel.processes import gather, host_value, is_first, start_processes
from audio_grpo.rollout.hearing import Hearing
from audio_grpo.training.batches import check_divides, join_parts, place_parts, reading_share
from audio_grpo.training.checkpoints import Checkpoints
from audio_grpo.training.curriculum import Curriculum
from audio_grpo.training.evaluate import Evaluator
from audio_grpo.training.journal import Journal
from audio_grpo.training.memory import check_fits, peak_memory, release_freed_memory
from audio_grpo.training.optimizer import learning_rate_schedule
from audio_grpo.training.programs import compile_learner, create_learner
from audio_grpo.training.reference import Reference, take_reference
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import Session, create_grpo_session, create_session
from audio_grpo.training.stopwatch import Stopwatch
from audio_grpo.training.telemetry import Phase, SampledCompletion
from audio_grpo.training.weights import starting_weights
from audio_grpo.types import GroupBatch


@dataclass(slots=True)
class Trainer:
    """A run in one of its phases: everything that a step needs or changes."""

    session: Session
    phase: Phase
    learner: Learner
    hearing: Hearing
    frozen: dict[str, Array]
    """Weights that training leaves as they are."""
    reference: Reference | None
    """For the KL; None where beta is 0 or the phase has none."""
    state: TrainState
    data: Curriculum

    @property
    def weights(self) -> dict[str, Array]:
        """All weights as they are now."""
        return {**self.frozen, **self.state.trainable}


@dataclass(slots=True)
class StepResult:
    """What a step tells."""

    metrics: dict[str, float]
    completions: list[tuple[SampledCompletion, np.ndarray | None]] = field(default_factory=list)
    """Each with its clip's samples at 16 kHz; None of a clip that another process read."""

    def timed(self, seconds: dict[str, float]) -> "StepResult":
        """The same with metrics of time; those that it has already add up."""
        added = {name: self.metrics.get(name, 0.0) + value for name, value in seconds.items()}
        return replace(self, metrics={**self.metrics, **added})


TrainStep = Callable[[Trainer, int], StepResult]
"""Does the step of a number, from 1 on."""


def create_trainer(config: Config, phase: Phase, loss_fn: Any, *, temperature: float, with_reference: bool) -> Trainer:
    """Build a phase from its starting weights, without looking for a checkpoint of its own; writes nothing."""
    start_processes()
    session = create_grpo_session(config) if phase == "grpo" else create_session(config)
    # Before the weights, which may take minutes: what does not divide or fit, and data that can not be read.
    check_divides(session.mesh, config.per_device_batch_size * session.mesh.size)
    _check_samplers_divide(session)
    if phase == "grpo":
        check_can_sample_ahead(session)
    gather(lambda: check_fits(session, phase, with_reference=with_reference))
    shown = -(-config.log_completions // config.num_generations) if phase == "grpo" else 0
    share = reading_share(session.mesh, prompts_per_step(config, session.mesh.size), samples=shown)
    data = Curriculum(create_audio_data_iterator(config, session.mesh, share), config)
    learner = create_learner(session, phase, loss_fn, temperature=temperature)
    if phase == "grpo":
        gather(lambda: compile_learner(session, learner))
        release_freed_memory(session.mesh.local_devices[0])
    weights = starting_weights(session, phase)
    trainable = {key: weights[key] for key in weights if key in session.trainable}
    return Trainer(
        session=session,
        phase=phase,
        learner=learner,
        hearing=Hearing(session.spec, session.mesh, session.clip_store),
        frozen={key: weights[key] for key in weights if key not in session.trainable},
        reference=take_reference(session, weights) if with_reference else None,
        state=learner.start(trainable),
        data=data,
    )


def _check_samplers_divide(session: Session) -> None:
    """Raise UserError unless a step's prompts can be shared out over the devices that only sample."""
    if session.sampler is None:
        return
    prompts, shards = prompts_per_step(session.config, session.mesh.size), batch_shards(session.sampler.mesh)
    if prompts % shards:
        raise UserError(
            f"A step of {prompts} prompts ({session.mesh.size} devices learn) does not divide over the {shards} "
            "devices that sample: set per_device_batch_size or gradient_accumulation_steps so that its prompts are a "
            f"multiple of {shards}, or change inference_devices_per_replica."
        )


def check_can_sample_ahead(session: Session) -> None:
    """Raise UserError where programs that sample ahead and those that learn would meet on several devices.

    Two threads launch them. On each device they run in the order in which they reach it, and a program of several
    devices waits for the others on each: where two of them come in different orders, both wait for ever.
    """
    processes = jax.process_count()
    if not session.config.sample_ahead:
        return
    if processes > 1:
        raise UserError(
            f"sample_ahead needs a run of one process, and this one has {processes}: start one process, on a host "
            "with devices that only sample, or leave sample_ahead out."
        )
    if session.sampler is None and session.mesh.size > 1:
        raise UserError(
            f"sample_ahead would sample and learn on the same {session.mesh.size} devices at once, and the two would "
            "wait for each other: set inference_devices_per_replica below that number, so that some devices only "
            "sample, or run on one device, or leave sample_ahead out."
        )


class Update(NamedTuple):
    """What one update told."""

    aux: Any
    """What the loss reports."""
    metrics: dict[str, float]
    """The gradient's norm, that of each part of the model, and whether the update was skipped and why."""


def update(trainer: Trainer, batch: GroupBatch, heard: Any) -> Update:
    """One optimizer step on a whole batch, which a NaN or an infinity anywhere in it skips.

    Raises:
        FloatingPointError: more than `max_skipped_updates` were skipped one after another.
    """
    total, aux = gradients(trainer, batch, heard)
    # In the order in which one spoils the next.
    checked = {"sampler_log_probs": batch.sampler_log_probs, "rewards": batch.advantages, "loss": aux.loss}
    present = {name: value for name, value in checked.items() if value is not None}
    trainer.state, report = trainer.learner.update(trainer.state, total, present)
    cause = next((name for name in (*present, "grad_norm") if not report.finite[name]), None)
    metrics = {
        "grad_norm": float(report.norm),
        **{f"grad_norm/{part}": float(norm) for part, norm in report.norms.items()},
        "skipped_updates": float(cause is not None),
    }
    if cause is None:
        return Update(aux, metrics)
    _check_skipped(trainer, cause, float(aux.loss), metrics["grad_norm"])
    return Update(aux, {**metrics, f"skipped_updates/{cause}": 1.0})


def _check_skipped(trainer: Trainer, cause: str, loss: float, norm: float) -> None:
    """Raise FloatingPointError where too many updates were skipped."""
    skipped, most = int(trainer.state.skipped), trainer.session.config.max_skipped_updates
    if skipped > most:
        raise FloatingPointError(
            f"Update {int(trainer.state.step) + 1} has loss {loss} and gradient norm {norm}: lower learning_rate or "
            "look at the batch's rewards; the last checkpoint is from before it. It is number "
            f"{skipped} in a row to be skipped for a NaN or an infinity, here in {cause}, and max_skipped_updates is "
            f"{most}."
        )


def gradients(trainer: Trainer, batch: GroupBatch, heard: Any) -> tuple[dict[str, Array], Any]:
    """Gradients of a whole batch's loss with respect to the trainable weights, and what the loss reports.

    The batch passes in `gradient_accumulation_steps` parts. Token weights are normalised over the whole batch, so the
    parts' gradients just add up.
    """
    total, aux = None, None
    for number, (part, part_heard) in enumerate(split(trainer, (batch, heard))):
        part_gradients, part_aux = trainer.learner.gradients(
            trainer.state.trainable, trainer.frozen, part, part_heard, _dropout_seed(trainer, number)
        )
        total = part_gradients if total is None else trainer.learner.add(total, part_gradients)
        aux = part_aux if aux is None else aux.merge(part_aux)
    assert total is not None and aux is not None
    return total, aux


def _dropout_seed(trainer: Trainer, part: int) -> np.uint32 | None:
    """Another for each part of each update, the same where a run goes on from a checkpoint; None without dropout."""
    if not trainer.session.config.lora_dropout:
        return None
    counts = [trainer.session.config.seed, int(trainer.state.step), int(trainer.state.skipped), part]
    return np.random.SeedSequence(counts).generate_state(1)[0]


def score(trainer: Trainer, weights: dict[str, Array], batch: GroupBatch, heard: Any) -> np.ndarray:
    """Log-probabilities of a whole batch's completions under `weights`, [B, G, C]."""
    pieces = [trainer.learner.score(weights, *part).log_probs for part in split(trainer, (batch, heard))]
    return join_parts(trainer.session.mesh, [host_value(piece) for piece in pieces])


def split(trainer: Trainer, tree: Any) -> Any:
    """A batch's `gradient_accumulation_steps` parts, one after the other, each placed on the mesh.

    Raises:
        UserError: a part does not divide by the mesh's shards.
    """
    return place_parts(trainer.session.mesh, tree, trainer.session.config.gradient_accumulation_steps)


def with_next_batch(learn: Callable[[Trainer, dict[str, Any], int], StepResult]) -> TrainStep:
    """The step that does so with the next batch of the data."""

    def step(trainer: Trainer, number: int) -> StepResult:
        watch = Stopwatch()
        with watch("data"):
            batch = next(trainer.data)
        return learn(trainer, batch, number).timed(watch.metrics)

    return step


def checkpoint_follows(config: Config, step: int) -> bool:
    """Whether a checkpoint is written after a step."""
    return config.enable_checkpointing and (step == config.steps or step % config.checkpoint_period == 0)


def run_phase(trainer: Trainer, train_step: TrainStep) -> RunFolder:
    """Run the phase's steps from its newest checkpoint, with metrics, completions, checkpoints and evaluations."""
    config, phase = trainer.session.config, trainer.phase
    run = RunFolder.create(config.base_output_directory, config.run_name)
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints / phase, config))
        done = _resume(trainer, run, checkpoints) if config.enable_checkpointing else 0
        if is_first():
            run.config_path.write_text(to_yaml(config))
            run.write_environment(trainer.session.devices)
        evaluator = Evaluator(trainer.session) if config.grain_eval_files else None
        if evaluator and not gather(run.evaluations_path.exists)[0]:
            _evaluate(trainer, run, evaluator, "start", 0)
        journal = stack.enter_context(Journal(run, phase, config, done=done)) if is_first() else None
        stack.callback(trainer.data.close)
        for step in range(done + 1, config.steps + 1):
            result = _timed(trainer, train_step, step)
            if journal:
                journal.write(step, result.metrics, result.completions)
            last = step == config.steps
            # Evaluated before it is kept: a run that is killed in between repeats both.
            if evaluator and (last or (config.eval_interval > 0 and step % config.eval_interval == 0)):
                _evaluate(trainer, run, evaluator, phase, step)
            if checkpoint_follows(config, step):
                checkpoints.save(step, trainer.state, trainer.data.get_state())
    if is_first():
        _tell_skipped(trainer)
    return run


def _resume(trainer: Trainer, run: RunFolder, checkpoints: Checkpoints) -> int:
    step, *others = gather(lambda: checkpoints.latest_step)
    if any(other != step for other in others):
        raise UserError(
            f"The newest checkpoint in {run.path} is that of step {step} for the first process, but of "
            f"{', '.join(map(str, others))} for the others: set base_output_directory to a folder that all share."
        )
    if step:
        restored = checkpoints.restore(trainer.state)
        trainer.state = restored.state
        trainer.data.set_state(restored.data)
        if is_first():
            print(f"Going on from the checkpoint of {trainer.phase} step {step} in {run.path}.", file=sys.stderr)
    return step


def _timed(trainer: Trainer, train_step: TrainStep, step: int) -> StepResult:
    started = time.perf_counter()
    result = train_step(trainer, step)
    seconds = time.perf_counter() - started
    timing = {
        "step_time": seconds,
        **peak_memory(trainer.session.mesh.local_devices),
        "tokens_per_second": result.metrics["num_tokens"] / seconds,
        "audio_seconds_per_second": result.metrics["audio_seconds"] / seconds,
        "learning_rate": float(np.asarray(learning_rate_schedule(trainer.session.config)(step - 1))),
    }
    return replace(result, metrics={**result.metrics, **timing})


def _evaluate(trainer: Trainer, run: RunFolder, evaluator: Evaluator, stage: str, step: int) -> None:
    report = evaluator.run(trainer.weights, stage=stage, step=step)
    if not is_first():
        return
    run.write_evaluation(report)
    rates = report.rates
    print(f"{stage} {step}: WER {rates.wer:.2%}, CER {rates.cer:.2%} on {rates.clips} clips", file=sys.stderr)


def _tell_skipped(trainer: Trainer) -> None:
    for reason, records in trainer.data.skipped.reasons.items():
        print(f"Skipped {len(records)} records: {reason}: {', '.join(records[:5])}", file=sys.stderr)
