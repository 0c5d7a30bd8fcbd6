"""Collectives of a compiled program, and what a chip sends in them."""

import math
import re
from collections import Counter
from collections.abc import Iterator

from audio_grpo.plan.hlo import Computation, Instruction, Module

# Rounds over a ring, in each of which a chip of n sends (n - 1) / n of the larger of what it puts in and gets out.
_RING_ROUNDS = {"all-gather": 1, "all-reduce": 2, "all-to-all": 1, "ragged-all-to-all": 1, "reduce-scatter": 1}
_PERMUTE = "collective-permute"


def collective_bytes(module: Module, computation: Computation, instruction: Instruction) -> Counter[str]:
    """What one collective sends, by its kind; nothing for any other instruction.

    A permutation sends all that it is given. The others go round a ring, where a chip of n sends (n - 1) / n of the
    array that is whole: the result of an all-gather, the operand of a reduce-scatter; an all-reduce is both of these.
    """
    if not _is_collective(instruction):
        return Counter()
    kind = instruction.opcode.removesuffix("-start")
    if computation.name.startswith("all-reduce-scatter"):  # on TPU an all-reduce that keeps one slice
        kind = "reduce-scatter"
    put_in = sum(array.bytes for name in instruction.operands for array in computation.instructions[name].arrays)
    got_out = sum(array.bytes for array in instruction.arrays)
    if instruction.opcode == "all-gather-start":  # whose results begin with its operands
        got_out -= put_in
    if kind == _PERMUTE:
        return Counter({kind: put_in})
    size = _group_size(module, instruction)
    return Counter({kind: _RING_ROUNDS[kind] * max(put_in, got_out) * (size - 1) // size})


def _is_collective(instruction: Instruction) -> bool:
    kind = instruction.opcode.removesuffix("-start")
    return kind in _RING_ROUNDS or kind == _PERMUTE


def fused_collectives(module: Module, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
    """Collectives inside the fusions of a computation, each with the computation it stands in."""
    for each in computation.instructions.values():
        if each.opcode == "fusion":
            yield from nested_collectives(module, module.computations[each.called[0]])


def nested_collectives(module: Module, fused: Computation) -> Iterator[tuple[Computation, Instruction]]:
    """Collectives inside a fused computation."""
    for each in fused.instructions.values():
        if _is_collective(each):
            yield fused, each
    yield from fused_collectives(module, fused)


def chain(instruction: Instruction) -> str:
    """Number of the chain of fusions over which TPU's compiler spreads a collective; "" for any other instruction."""
    found = re.search(r'chain_id="(\d+)"', instruction.attributes)
    return found[1] if found else ""


def _group_size(module: Module, instruction: Instruction) -> int:
    """Devices that exchange with each other, from any of the notations of `replica_groups`."""
    text = instruction.attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    if counted := re.match(r"\[\d+,(\d+)\]<=", text):
        return int(counted[1])
    if named := re.match(r"mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return module.devices
