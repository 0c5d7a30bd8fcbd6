"""A run planned: every program of a step compiled for a topology, its memory and its least time, before it is begun."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.plan.chips import Chip, local_chip
from audio_grpo.plan.cost import ProgramCost, program_cost
from audio_grpo.plan.decoding import DecodeStep, decode_step
from audio_grpo.plan.flops import Counting
from audio_grpo.plan.roofline import Roofline, roofline
from audio_grpo.plan.topology import Topology, compile_ahead, parse_topology, topology_devices
from audio_grpo.training.loop import check_can_sample_ahead
from audio_grpo.training.memory import bytes_per_device
from audio_grpo.training.programs import Program, Workload, both_at_once, resident, run_programs, workload_of
from audio_grpo.training.session import Session, create_grpo_session

_SAMPLING = ("tower", "prefill", "decode burst")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramPlan:
    """One program of a step, per chip; sizes in bytes."""

    phase: str
    runs: int
    """In one step."""
    held: int
    """In memory beside what the program makes: all weights, the optimizer's state, its other arguments, caches."""
    made: int
    """Temporaries, results that take no argument's place, and code; of a program that the compiler refuses for its
    size, what it told, arguments included."""
    cost: ProgramCost | None
    """None where the compiler refuses the program for its size."""
    roofline: Roofline | None
    """Of one run."""
    decoding: DecodeStep | None = None
    """Of the decode burst alone."""

    @property
    def total(self) -> int:
        """Bytes in memory while it runs."""
        return self.held + self.made

    @property
    def seconds(self) -> float:
        """Least time of all its runs in a step; NaN where it was refused."""
        return math.nan if self.roofline is None else self.runs * self.roofline.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run needs of each chip, and what it gives."""

    model_name: str
    topology: str
    """Name of a slice, e.g. "v4-8", or of the local device."""
    chip: Chip
    mesh: dict[str, int]
    work: Workload
    kept: dict[str, int]
    """Bytes in memory from the first step to the last: weights, optimizer state, reference."""
    cache: int
    """Bytes of keys, values and slots while sampling."""
    programs: tuple[ProgramPlan, ...]

    @property
    def peak(self) -> ProgramPlan:
        """The program that needs most memory."""
        return max(self.programs, key=lambda program: program.total)

    @property
    def fits(self) -> bool:
        """Whether every program has room."""
        return self.peak.total <= self.chip.memory and all(program.cost for program in self.programs)

    @property
    def chips(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def step_seconds(self) -> float:
        """Least time of a step; NaN where a program was refused."""
        return sum(program.seconds for program in self.programs)

    @property
    def clips_per_second(self) -> float:
        """Prompts a step over its least time."""
        return self.work.prompts / self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens over the step's least time."""
        return self.work.prompts * self.work.generations * self.work.completion_length / self.step_seconds


class Planner:
    """Compiles a configuration's programs for one topology, or for this machine's devices."""

    def __init__(self, topology: str | None, config: Config) -> None:
        """Raises UserError: the topology is unknown, its compiler is missing, or the run samples nothing."""
        if not config.use_grpo:
            raise UserError("use_grpo is false: `plan` compiles the programs of GRPO; set use_grpo=true.")
        self._topology: Topology | None = None if topology is None else parse_topology(topology)
        self._devices: Sequence[object] = jax.devices() if self._topology is None else topology_devices(self._topology)
        self.config = config

    @cached_property
    def chip(self) -> Chip:
        """What is planned for."""
        return local_chip(self.session(self.config).weight_dtype) if self._topology is None else self._topology.chip

    def session(self, config: Config) -> Session:
        """The configuration's model on the planned devices."""
        return create_grpo_session(config, self._devices)

    def plan(self, config: Config | None = None, *, phases: Sequence[str] = ()) -> RunPlan:
        """Compile the programs of a configuration, that of the planner by default; of some phases alone if named."""
        session = self.session(config or self.config)
        check_can_sample_ahead(session)
        kept = resident(session)
        sizes = {
            "weights": bytes_per_device((kept.weights, kept.ahead)),
            "optimizer": bytes_per_device(kept.optimizer),
            "reference": bytes_per_device(kept.reference),
        }
        everything = list(run_programs(session))
        programs = [x for x in everything if not phases or x.phase in phases]
        meanwhile = self._sampling(everything) if both_at_once(session) else 0

        def held(program: Program) -> int:
            return sum(sizes.values()) + (0 if program.phase in _SAMPLING else meanwhile)

        work = workload_of(session)
        return RunPlan(
            model_name=session.config.model_name,
            topology=self._topology.name if self._topology else session.devices,
            chip=self.chip,
            mesh=dict(session.mesh.shape),
            work=work,
            kept=sizes,
            cache=max((bytes_per_device(x.cache) for x in programs), default=0),
            programs=tuple(
                self._compile(program, held(program) if program.session is session else _of_sampler(program))
                for program in programs
            ),
        )

    def _sampling(self, programs: Sequence[Program]) -> int:
        """The most that sampling takes beside what is kept, on a device that learns at the same time."""
        return max(self._compile(program, 0).total for program in programs if program.phase in _SAMPLING)

    def _compile(self, program: Program, kept: int) -> ProgramPlan:
        held = kept + bytes_per_device((program.inputs, program.cache, program.beside))
        traced = program.trace()
        try:
            compiled = compile_ahead(traced.lower())
        except jax.errors.JaxRuntimeError as error:
            return ProgramPlan(
                phase=program.phase,
                runs=program.runs,
                held=held,
                made=max(0, _refused_size(error) - bytes_per_device(program.arguments)),
                cost=None,
                roofline=None,
            )
        mesh = program.session.mesh
        cost = program_cost(
            traced.jaxpr,
            compiled,
            chips=mesh.size,
            counting=Counting(
                platform=mesh.devices.flat[0].platform, while_steps=program.turns, routed_share=program.routed_share
            ),
        )
        return ProgramPlan(
            phase=program.phase,
            runs=program.runs,
            held=held,
            made=cost.temporaries + cost.outputs - cost.aliased + cost.code,
            cost=cost,
            roofline=roofline(cost, self.chip),
            decoding=decode_step(program, cost) if program.phase == "decode burst" else None,
        )


def _of_sampler(program: Program) -> int:
    """Samplers that do not learn keep the weights alone."""
    return bytes_per_device(program.session.abstract_weights)


def _refused_size(error: Exception) -> int:
    """Bytes that the compiler says the program would take, arguments among them in either of its two sentences.

    Any other refusal is not for us to explain.
    """
    size = r"([\d.]+)([KMGT])"
    told = re.search(rf"Used {size} of [\d.]+[KMGT] hbm|for HLO temporaries \({size}\)", str(error))
    if told is None:
        raise error
    number, unit = (group for group in told.groups() if group)
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))
