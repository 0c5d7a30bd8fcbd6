"""Bytes that a compiled program moves through memory and between chips, with its loops multiplied out."""

from collections import Counter

from audio_grpo.plan.collectives import chain, collective_bytes, fused_collectives, nested_collectives
from audio_grpo.plan.hlo import Array, Computation, Instruction, Module
from audio_grpo.plan.loops import trip_count

MEMORY = "memory"
"""Key of a chip's own memory in the traffic; the others are kinds of collectives."""

_SLICES = {"dynamic-slice", "gather", "slice"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # position of the operand that is written

_GROUPED_KERNEL = "jit(gmm)"
"""Names megablox's grouped product in an op_name."""

_MARKS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
)


def program_traffic(module: Module, while_steps: int = 1) -> Counter[str]:
    """Bytes of one chip: under `MEMORY` those read and written, under each kind of collective those sent.

    Every instruction outside a fusion reads its operands and writes its results once, where they lie in the chip's
    main memory; a slice or a gather reads what it takes and an update writes what it changes, also inside a fusion,
    and of a branch the costliest way counts. Loops whose trip count is not in the program count `while_steps` times.
    """
    return _computation_traffic(module, module.entry, while_steps)


def _computation_traffic(module: Module, computation: Computation, while_steps: int) -> Counter[str]:
    total = Counter()
    for instruction in computation.instructions.values():
        total.update(_instruction_traffic(module, computation, instruction, while_steps))
    # The compiler hides a collective behind several fusions, each of which repeats it: its chain counts once.
    chains = {chain(each): (inner, each) for inner, each in fused_collectives(module, computation) if chain(each)}
    for inner, collective in chains.values():
        total.update(collective_bytes(module, inner, collective))
        total[MEMORY] += _operand_bytes(inner, collective) + _result_bytes(collective)
    return total


def _instruction_traffic(
    module: Module, computation: Computation, instruction: Instruction, while_steps: int
) -> Counter[str]:
    if instruction.opcode in ("while", "call", "conditional", "async-start"):
        inner = [_computation_traffic(module, module.computations[name], while_steps) for name in instruction.called]
        if instruction.opcode == "conditional":
            return max(inner, key=Counter.total)
        trips = trip_count(module, computation, instruction) if instruction.opcode == "while" else 1
        return Counter(
            {kind: (while_steps if trips is None else trips) * amount for kind, amount in sum(inner, Counter()).items()}
        )
    if _moves_nothing(instruction):
        return Counter()
    total = collective_bytes(module, computation, instruction)
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called[0]]
        for inner, collective in nested_collectives(module, fused):
            total.update({} if chain(collective) else collective_bytes(module, inner, collective))
    total[MEMORY] += _bytes_read(module, computation, instruction) + _bytes_written(module, computation, instruction)
    return total


def _bytes_read(module: Module, computation: Computation, instruction: Instruction) -> int:
    operands = enumerate(instruction.operands)
    return sum(_operand_read(module, computation, instruction, place, name) for place, name in operands)


def _operand_read(module: Module, computation: Computation, instruction: Instruction, place: int, name: str) -> int:
    """Bytes of main memory that `instruction` reads of its operand number `place`."""
    arrays = computation.instructions[name].arrays
    whole = sum(array.bytes for array in arrays if array.in_memory)
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "fusion":
        return min(whole, _parameter_read(module, module.computations[instruction.called[0]], place))
    if place == 0 and opcode in _SLICES:
        return min(whole, instruction.arrays[-2 if instruction.opcode.endswith("-start") else 0].bytes)
    if place == 0 and opcode in _UPDATES:
        return 0
    if instruction.opcode == "custom-call" and _GROUPED_KERNEL in instruction.op_name:
        return _read_by_groups(computation, instruction, arrays[0], whole)
    return whole


def _read_by_groups(computation: Computation, instruction: Instruction, operand: Array, whole: int) -> int:
    """Of matrices, the kernel reads one for each group of rows; its second operand has the groups' first rows."""
    if len(operand.dims) != 3:
        return whole
    (bounds,) = computation.instructions[instruction.operands[1]].arrays
    return whole * min(operand.dims[0], bounds.dims[0] - 1) // operand.dims[0]


def _parameter_read(module: Module, fused: Computation, place: int) -> int:
    """Bytes that a fusion takes of one of its parameters, which may lie anywhere."""
    waiting, total = [fused.parameters[place].name], 0
    while waiting:
        name = waiting.pop()
        if name == fused.root.name:  # handed on under another name
            total += sum(array.bytes for array in fused.root.arrays)
        for user in fused.users(name):
            if user.opcode in ("bitcast", "reshape"):
                waiting.append(user.name)
            elif not _moves_nothing(user):
                total += sum(
                    _operand_read(module, fused, user, position, name)
                    for position, operand in enumerate(user.operands)
                    if operand == name
                )
    return total


def _bytes_written(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes of main memory that `instruction` writes: its results, less the operands that a -start hands on."""
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called[0]]
        roots = _results(fused, fused.root)
        if len(roots) != len(instruction.arrays):  # one instruction that makes several results
            return _result_bytes(instruction)
        parts = zip(instruction.arrays, roots, strict=True)
        return sum(min(array.bytes, _root_bytes(module, fused, root)) for array, root in parts if array.in_memory)
    if instruction.opcode in _UPDATES:
        update = computation.instructions[instruction.operands[_UPDATES[instruction.opcode]]]
        return min(_result_bytes(instruction), sum(array.bytes for array in update.arrays))
    hands_on = instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start"
    return _result_bytes(instruction) - (_operand_bytes(computation, instruction) if hands_on else 0)


def _moves_nothing(instruction: Instruction) -> bool:
    """Another instruction's bytes are the ones it stands for, or those of its chain."""
    waits = instruction.opcode.endswith(("-done", "-update"))
    marks = any(f'custom_call_target="{name}"' in instruction.attributes for name in _MARKS)
    return instruction.is_plumbing or waits or marks or chain(instruction) != ""


def _results(fused: Computation, root: Instruction) -> list[Instruction]:
    """The instructions that make each result of a fusion."""
    if root.opcode != "tuple":
        return [root]
    return [fused.instructions[name] for name in root.operands]


def _root_bytes(module: Module, fused: Computation, root: Instruction) -> int:
    """Bytes that change in the result of a fusion."""
    if root.opcode in ("bitcast", "get-tuple-element"):
        source = fused.instructions[root.operands[0]]
        return min(sum(array.bytes for array in root.arrays), _root_bytes(module, fused, source))
    if _moves_nothing(root):
        return 0
    if root.opcode in _UPDATES:
        return sum(array.bytes for array in fused.instructions[root.operands[_UPDATES[root.opcode]]].arrays)
    if root.opcode == "fusion":
        inner = module.computations[root.called[0]]
        return sum(_root_bytes(module, inner, each) for each in _results(inner, inner.root))
    return sum(array.bytes for array in root.arrays)


def _result_bytes(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.in_memory)


def _operand_bytes(computation: Computation, instruction: Instruction) -> int:
    return sum(_result_bytes(computation.instructions[name]) for name in instruction.operands)
