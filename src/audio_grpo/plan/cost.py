"""What one compiled program costs a chip: memory, operations, traffic, and its largest arrays."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
from jax.extend.core import ClosedJaxpr

from audio_grpo.plan.flops import Counting, program_flops
from audio_grpo.plan.hlo import Module, parse_module
from audio_grpo.plan.loops import guessed_loops
from audio_grpo.plan.traffic import MEMORY, program_traffic

SMALLEST_BUFFER = 1 << 20
"""Bytes from which an array is listed among a program's buffers."""


@dataclass(frozen=True)
class Buffer:
    """An array that the program writes on each chip: its dimensions there, XLA's dtype, bytes, and where it is made."""

    dims: tuple[int, ...]
    dtype: str
    bytes: int
    op_name: str


@dataclass(frozen=True)
class ProgramCost:
    """One run of a program on each chip.

    Attributes:
        arguments: bytes of its arguments.
        outputs: bytes of its results.
        aliased: bytes of results that take the place of donated arguments.
        temporaries: most bytes of other arrays at one time.
        code: bytes of the program itself.
        flops: floating-point operations, an equal share of the whole program's.
        memory_traffic: bytes read from and written to the chip's memory.
        collectives: bytes sent to other chips by kind of collective.
        buffers: arrays of at least `SMALLEST_BUFFER`, largest first, one for each shape, dtype and op_name.
        guessed_loops: where the loops come from that were counted `while_steps` times.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: float
    memory_traffic: int
    collectives: Mapping[str, int]
    buffers: tuple[Buffer, ...]
    guessed_loops: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes that must fit: arguments and results, one place for both where they are aliased, temporaries, code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def sent(self) -> int:
        """Bytes sent to other chips."""
        return sum(self.collectives.values())

    def dimensions(self) -> Iterator[int]:
        """Every dimension of every buffer."""
        for buffer in self.buffers:
            yield from buffer.dims


def program_cost(jaxpr: ClosedJaxpr, compiled: jax.stages.Compiled, *, chips: int, counting: Counting) -> ProgramCost:
    """The cost to each chip of a program, as the compiler tells it.

    Memory is the compiler's. FLOPs are counted in the traced program and shared out equally, so that work which every
    chip repeats is counted once; bytes are counted in the compiled program (see `program_flops`, `program_traffic`).

    Args:
        jaxpr: `jitted.trace(...).jaxpr`.
        compiled: the same program, lowered and compiled for `chips` devices.
        chips: number of devices of the program.
        counting: what the program does not tell.

    Raises:
        RuntimeError: this platform's compiler tells neither.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError(f"the compiler for {counting.platform} does not tell a program's memory and instructions")
    module = parse_module(text)
    traffic = program_traffic(module, counting.while_steps)
    return ProgramCost(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=program_flops(jaxpr, counting) / chips,
        memory_traffic=traffic.pop(MEMORY, 0),
        collectives=dict(traffic),
        buffers=_buffers(module),
        guessed_loops=guessed_loops(module),
    )


def _buffers(module: Module) -> tuple[Buffer, ...]:
    # The results of a -start include its operands; those of the -done do not.
    passed_on = ("while", "call", "conditional")
    found = {
        Buffer(array.dims, array.dtype, array.bytes, instruction.op_name)
        for computation in module.executed()
        for instruction in computation.instructions.values()
        if not instruction.is_plumbing
        and instruction.opcode not in passed_on
        and not instruction.opcode.endswith(("-start", "-update"))
        for array in instruction.arrays
        if array.bytes >= SMALLEST_BUFFER
    }
    return tuple(sorted(found, key=lambda buffer: (-buffer.bytes, buffer.dims, buffer.dtype, buffer.op_name)))
