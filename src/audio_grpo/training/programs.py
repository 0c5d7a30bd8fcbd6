"""A run's programs with abstract arguments: what a step of GRPO executes, how often, and what lies in memory then."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from audio_grpo.data.pipeline import padded_frames, prompts_per_step
from audio_grpo.grpo import Learner, grpo_loss_fn, init_train_state, loss_settings
from audio_grpo.model.experts import tokens_travel
from audio_grpo.model.router import route_dtype, routes_width
from audio_grpo.model.spec import compute_dtype
from audio_grpo.parallel.mesh import batch_sharding, batch_shards, replicated
from audio_grpo.rollout.compiled import EnginePrograms
from audio_grpo.rollout.hearing import Hearing
from audio_grpo.rollout.settings import WorkloadShape, engine_settings, workload_shape
from audio_grpo.rollout.state import NewPrompts, Queue
from audio_grpo.training.optimizer import create_optimizer
from audio_grpo.training.session import Session
from audio_grpo.training.telemetry import Phase
from audio_grpo.types import AudioBatch, GroupBatch, PromptBatch, Routes

Abstract = Any
"""A pytree of `jax.ShapeDtypeStruct`s with shardings."""


def create_learner(session: Session, phase: Phase, loss_fn: Any, *, temperature: float) -> Learner:
    """The programs of a phase's updates; touches no weight."""
    config = session.config
    optimizer = create_optimizer(config, config.num_iterations if phase == "grpo" else 1)
    return Learner(
        session.spec,
        optimizer,
        loss_fn,
        audio_pad=session.special.audio_pad,
        temperature=temperature,
        chunk_bytes=config.logits_chunk_mib << 20,
        lora_dropout=config.lora_dropout,
        # Parts' losses add up, and each has a balance of its own.
        router_aux_loss_coef=config.router_aux_loss_coef / config.gradient_accumulation_steps,
        shardings=_state_shardings(session, optimizer),
    )


def _state_shardings(session: Session, optimizer: Any) -> Any:
    """A sharding for each array of the state: moments and master weights lie where their weights do."""

    def sharding(path: Sequence[Any], _: Any) -> NamedSharding:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return session.shardings[keys[-1]] if keys else replicated(session.mesh)

    trainable = {key: weight for key, weight in session.abstract_weights.items() if key in session.trainable}
    state = jax.eval_shape(partial(init_train_state, optimizer=optimizer), trainable)
    return jax.tree_util.tree_map_with_path(sharding, state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One compiled program of a step."""

    phase: str
    """E.g. "prefill"."""
    session: Session
    """Whose devices it runs on: the learners' or the samplers', where these are apart."""
    program: Any
    """As `jax.jit` returned it."""
    arguments: tuple[Abstract, ...]
    runs: int
    """In one step."""
    turns: int = 1
    """Of its loop whose length is not fixed: the tokens of a burst."""
    routed_share: float = 1.0
    """Share of an expert kernel's rows that belong to the chip's own experts, where these are chosen evenly."""
    inputs: Abstract = ()
    """Arguments that are neither `Resident` nor cache."""
    cache: Abstract = ()
    """Keys, values and slots."""
    beside: Abstract = ()
    """What lies in memory while it runs and is none of its arguments, nor `Resident`."""

    def trace(self) -> jax.stages.Traced:
        """The program, traced."""
        return self.program.trace(*self.arguments)


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes of one step at its largest."""

    prompts: int
    generations: int
    learned: int
    """Completions of each prompt that the learner is given: those sampled, and the transcript where it is learned."""
    parts: int
    """Of a batch, in gradient accumulation."""
    frames: int
    prompt_length: int
    completion_length: int
    shape: WorkloadShape


def workload_of(session: Session) -> Workload:
    """One step of the session's run at its largest: clips of `audio_max_seconds`, completions of full length."""
    config = session.config
    prompts = prompts_per_step(config, session.mesh.size)
    sampler = session.sampler or session
    settings = engine_settings(config)
    return Workload(
        prompts=prompts,
        generations=config.num_generations,
        learned=config.num_generations + config.learns_transcripts,
        parts=config.gradient_accumulation_steps,
        frames=padded_frames(config.audio_max_seconds, config.max_prefill_predict_length),
        prompt_length=config.max_prefill_predict_length,
        completion_length=config.max_completion_length,
        shape=workload_shape(settings, batch_shards(sampler.mesh), prompts, config.num_generations),
    )


def run_programs(session: Session) -> Iterator[Program]:
    """The programs of a GRPO step in their order."""
    work = workload_of(session)
    yield from _rollout_programs(session.sampler or session, work)
    temperature = session.config.decode_sampling_temperature
    yield from _learner_programs(
        session, work, create_learner(session, "grpo", _loss(session), temperature=temperature)
    )


@dataclass(frozen=True, slots=True)
class Resident:
    """What lies in memory all the time, and the gradients."""

    weights: Abstract
    optimizer: Abstract
    """Moments, and the master copy of weights that are stored in a narrower format."""
    reference: Abstract
    """The reference's copy of what learns; none where beta is 0, or where it lies on the host."""
    gradients: Abstract
    """Of a batch: there from the first backward pass to the update."""
    ahead: Abstract
    """What learns, once more, where a device samples ahead with it while it learns."""


def resident(session: Session) -> Resident:
    """What a GRPO run keeps from its first step to its last on its learners' devices."""
    weights = session.abstract_weights
    learner = create_learner(session, "grpo", _loss(session), temperature=1.0)
    trainable = {key: value for key, value in weights.items() if key in session.trainable}
    state = learner.abstract_state(trainable)
    reference = {} if session.config.reference_offload else _reference(session)
    ahead = trainable if both_at_once(session) else {}
    return Resident(weights, state._replace(trainable={}), reference, _gradients(trainable), ahead)


def both_at_once(session: Session) -> bool:
    """Whether the devices that learn sample at the same time."""
    return session.config.sample_ahead and session.sampler is None


def _rollout_programs(session: Session, work: Workload) -> Iterator[Program]:
    settings, shape = engine_settings(session.config), work.shape
    programs = EnginePrograms(session.spec, settings, session.special, session.mesh)
    weights, state = session.abstract_weights, programs.abstract_state(shape)
    heard, audio = _heard(session, work, work.prompts), _audio(session, work)
    yield Program(
        phase="tower",
        session=session,
        program=Hearing(session.spec, session.mesh).program,
        arguments=(weights, audio),
        runs=1,
        inputs=audio,
    )
    everywhere: Any = partial(_everywhere, session)
    rows, per_part = shape.rows // shape.parts, shape.prefill // shape.parts
    new = NewPrompts(
        prompts=_prompts(session, work, shape.prefill),
        heard=_heard(session, work, shape.prefill),
        key=everywhere((shape.prefill,), jax.eval_shape(jax.random.key, 0).dtype),
        limit=everywhere((shape.prefill, work.generations), jnp.int32),
        row=everywhere((shape.parts, per_part), jnp.int32),
    )
    yield Program(
        phase="prefill",
        session=session,
        program=programs.prefill,
        arguments=(weights, state, new),
        runs=-(-work.prompts // shape.prefill),
        routed_share=_routed_share(session, shape.prefill * work.prompt_length),
        inputs=new,
        cache=state,
        beside=(heard, audio),
    )
    waves = -(-work.prompts * work.generations // shape.slots)
    queue = Queue(
        ring=everywhere((shape.parts, rows), jnp.int32),
        end=everywhere((shape.parts,), jnp.int32),
        cancelled=everywhere((shape.parts, rows, work.generations), jnp.bool_),
        closed=everywhere((), jnp.bool_),
    )
    yield Program(
        phase="decode burst",
        session=session,
        program=programs.burst,
        arguments=(shape.narrow_at, weights, everywhere((session.spec.decoder.vocab,), jnp.bool_), state, queue),
        runs=waves * -(-work.completion_length // settings.burst),
        turns=min(settings.burst, work.completion_length),
        routed_share=1 / session.mesh.shape["expert"],
        cache=state,
        beside=(heard, audio),
    )


def compile_learner(session: Session, learner: Learner) -> None:
    """Compile a GRPO run's scoring, gradients and update, which its steps then call.

    Before there are weights this tells sooner what can not be compiled, and the compiler's memory is not taken on top
    of theirs. Scoring is left out where only adapters' reference does so: whether it has any is known from the weights.
    """
    for program in _learner_programs(session, workload_of(session), learner):
        by_reference_alone = program.phase == "scoring" and session.config.num_iterations == 1
        if not (by_reference_alone and session.config.lora_rank):
            program.trace().lower().compile()


def _learner_programs(session: Session, work: Workload, learner: Learner) -> Iterator[Program]:
    config, weights = session.config, session.abstract_weights
    trainable = {key: value for key, value in weights.items() if key in session.trainable}
    frozen = {key: value for key, value in weights.items() if key not in session.trainable}
    count = work.prompts // work.parts
    groups = _groups(session, work, count)
    routed = _routed_share(session, count * work.learned * work.completion_length)
    heard = _audio(session, work, count) if session.tower_learns else _heard(session, work, count)
    scored = (config.grpo_beta > 0) + (config.num_iterations > 1)
    if scored:
        unscored = groups._replace(old_log_probs=None, reference_log_probs=None)
        yield Program(
            phase="scoring",
            session=session,
            program=learner.score_program,
            arguments=({**weights, **_reference(session)}, unscored, heard),
            runs=work.parts * scored,
            routed_share=routed,
            inputs=(unscored, heard),
            beside=_reference(session) if config.reference_offload else (),
        )
    gradients = _gradients(trainable)
    seed = jax.ShapeDtypeStruct((), jnp.uint32) if config.lora_dropout else None
    yield Program(
        phase="gradients",
        session=session,
        program=learner.gradients_program,
        arguments=(trainable, frozen, groups, heard, seed),
        runs=work.parts * config.num_iterations,
        routed_share=routed,
        inputs=(groups, heard),
        beside=gradients if work.parts > 1 else (),
    )
    yield Program(
        phase="update",
        session=session,
        program=learner.apply_program,
        arguments=(learner.abstract_state(trainable), gradients, _checked(session, work)),
        runs=config.num_iterations,
        inputs=gradients,
    )


def _checked(session: Session, work: Workload) -> dict[str, Abstract]:
    """What a NaN is looked for in before an update; all but the loss comes from the host."""
    tokens = (work.prompts, work.learned, work.completion_length)
    shapes = {"sampler_log_probs": tokens, "rewards": tokens[:2]}
    told = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return {**told, "loss": _everywhere(session, (), jnp.float32)}


def _reference(session: Session) -> dict[str, jax.ShapeDtypeStruct]:
    """Its copy of what learns. Fresh adapters need none, but whether they are is known once weights are read."""
    if session.config.grpo_beta == 0:
        return {}
    weights, dtype = session.abstract_weights, session.reference_dtype
    return {
        key: jax.ShapeDtypeStruct(weights[key].shape, dtype, sharding=weights[key].sharding)
        for key in weights
        if key in session.trainable
    }


def _routed_share(session: Session, tokens: int) -> float:
    """Tokens that travel meet at every device that has experts; where experts travel, each device has all of them."""
    shards = session.mesh.shape["expert"]
    travel = tokens_travel(session.spec.decoder, tokens // batch_shards(session.mesh), shards)
    return 1 / shards if travel else 1.0


def _gradients(trainable: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        key: jax.ShapeDtypeStruct(value.shape, jnp.float32, sharding=value.sharding) for key, value in trainable.items()
    }


def _loss(session: Session) -> Any:
    return partial(grpo_loss_fn, settings=loss_settings(session.config))


def _groups(session: Session, work: Workload, count: int) -> GroupBatch:
    tokens = (count, work.learned, work.completion_length)
    real = partial(_shared, session, tokens)
    config = session.config
    return GroupBatch(
        prompts=_prompts(session, work, count),
        completion_tokens=real(jnp.int32),
        mask=real(jnp.bool_),
        advantages=_shared(session, tokens[:2], jnp.float32),
        token_weights=real(jnp.float32),
        old_log_probs=real(jnp.float32) if config.num_iterations > 1 else None,
        reference_log_probs=real(jnp.float32) if config.grpo_beta > 0 else None,
        sampler_log_probs=real(jnp.float32),
        entropy_weights=real(jnp.float32) if config.entropy_coef > 0 else None,
        transcript_weights=real(jnp.float32) if config.learns_transcripts else None,
        routes=_routes(session, work, count) if config.router_replay else None,
    )


def _routes(session: Session, work: Workload, count: int) -> Routes:
    """Those of what was sampled; a transcript has none."""
    decoder = session.spec.decoder
    real = partial(_shared, session, dtype=route_dtype(decoder))
    width = routes_width(decoder)
    completions = (count, work.generations, work.completion_length, width)
    return Routes(real((count, work.prompt_length, width)), real(completions))


def _prompts(session: Session, work: Workload, count: int) -> PromptBatch:
    return PromptBatch(_shared(session, (count, work.prompt_length), jnp.int32), _shared(session, (count,), jnp.int32))


def _audio(session: Session, work: Workload, count: int | None = None) -> AudioBatch:
    count = count or work.prompts
    features = (count, session.spec.audio.mel_bins, work.frames)
    return AudioBatch(_shared(session, features, jnp.float32), _shared(session, (count,), jnp.int32))


def _heard(session: Session, work: Workload, count: int) -> Any:
    tower = session.spec.audio
    unit = tower.chunk_frames if work.frames <= tower.window_frames else tower.window_frames
    tokens = -(-work.frames // unit) * unit // tower.chunk_frames * tower.chunk_tokens
    return _shared(session, (count, tokens, session.spec.decoder.width), compute_dtype(session.spec))


def _shared(session: Session, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(session.mesh))


def _everywhere(session: Session, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(session.mesh))
