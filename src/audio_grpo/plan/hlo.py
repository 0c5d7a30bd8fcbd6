"""The text of a compiled XLA program, read into computations and instructions."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r":T\(([\d,]+)\)")
_CALLED = {
    "while": re.compile(r"(?:condition|body)=%?([\w.-]+)"),
    "call": re.compile(r"to_apply=%?([\w.-]+)"),
    "async-start": re.compile(r"calls=%?([\w.-]+)"),
    "fusion": re.compile(r"calls=%?([\w.-]+)"),
}
_PLUMBING = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}


@dataclass(frozen=True)
class Array:
    """An array of one device.

    Attributes:
        dtype: XLA's name of its type.
        dims: its dimensions.
        bytes: what it occupies, with the padding of a TPU's tiles.
        in_memory: it lies in the chip's main memory (HBM) and not in one of the small memories on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    in_memory: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction: `name = arrays opcode(operands), attributes`; of a constant, the operand is its value."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @cached_property
    def op_name(self) -> str:
        """Where in the JAX program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def is_plumbing(self) -> bool:
        """It names or groups arrays that another instruction made."""
        return self.opcode in _PLUMBING

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Computations of a loop (its condition and its body), a branch, a call or a fusion."""
        if self.opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
            text = listed[1] if listed else " ".join(re.findall(r"(?:true|false)_computation=\S+", self.attributes))
            return tuple(re.findall(r"%([\w.-]+)", text))
        return tuple(_CALLED[self.opcode].findall(self.attributes)) if self.opcode in _CALLED else ()


@dataclass(frozen=True)
class Computation:
    """A named list of instructions, in the order of their execution."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value is the result."""
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by their number."""
        return {int(each.operands[0]): each for each in self.instructions.values() if each.opcode == "parameter"}

    def users(self, name: str) -> list[Instruction]:
        """Instructions that have `name` among their operands."""
        return [instruction for instruction in self.instructions.values() if name in instruction.operands]


@dataclass(frozen=True)
class Module:
    """A program: its computations, its entry, and the number of devices it runs on."""

    computations: dict[str, Computation]
    entry: Computation
    devices: int

    def executed(self) -> Iterator[Computation]:
        """The entry and what it reaches by loops, branches and calls, without the insides of fusions."""
        waiting, seen = [self.entry.name], set()
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                yield self.computations[name]
                for each in self.computations[name].instructions.values():
                    waiting += each.called if each.opcode != "fusion" else ()


def parse_module(text: str) -> Module:
    """Read `jax.stages.Compiled.as_text()`."""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = {}
            computations[header[2]] = Computation(header[2], current)
            entry = header[2] if header[1] else entry
        elif line.startswith("  ") and " = " in line:
            instruction = _parse_instruction(line)
            current[instruction.name] = instruction
    header = text.partition("\n")[0]
    counts = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)]
    return Module(computations, computations[entry], math.prod(counts))


def _parse_instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    opcode, inside = rest[:start], rest[start + 1 : stop]
    operands = (inside,) if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.-]+)", inside))
    arrays = tuple(_array(*found) for found in _ARRAY.findall(shape))
    name = left.removeprefix("ROOT ").removeprefix("%")
    return Instruction(name, arrays, opcode, operands, rest[stop + 1 :], left.startswith("ROOT "))


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses in {text!r}")


def _array(dtype: str, dims: str, layout: str) -> Array:
    sizes = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
    order = layout.partition(":")[0]
    physical = [sizes[int(axis)] for axis in reversed(order.split(","))] if order else list(sizes)
    tile = _TILE.search(layout)
    tiles = [int(size) for size in tile[1].split(",")] if tile else []
    physical = [1] * (len(tiles) - len(physical)) + physical
    for back, size in enumerate(reversed(tiles), 1):
        physical[-back] = -(-physical[-back] // size) * size
    return Array(dtype, sizes, math.prod(physical) * _bits(dtype) // 8, "S(" not in layout)


def _bits(dtype: str) -> int:
    """Bits of an element: the first number in the type's name, as in bf16, s4 and f8e4m3fn."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else {"pred": 8}.get(dtype, 0)
