"""How often the loops of a compiled program turn."""

import re

from audio_grpo.plan.hlo import Computation, Instruction, Module


def guessed_loops(module: Module) -> tuple[str, ...]:
    """Where the loops come from whose trip count is not in the program."""
    return tuple(
        each.op_name or each.name
        for computation in module.executed()
        for each in computation.instructions.values()
        if each.opcode == "while" and trip_count(module, computation, each) is None
    )


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Turns of a loop: XLA's own note of them, or the count from a constant to a constant, as `scan` makes it."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(noted[1])
    names = {key: re.search(rf"{key}=%?([\w.-]+)", loop.attributes) for key in ("condition", "body")}
    condition, body = (module.computations[found[1]] for found in names.values() if found)
    test, start = condition.root, computation.instructions[loop.operands[0]]
    if test.opcode != "compare" or "direction=LT" not in test.attributes or start.opcode != "tuple":
        return None
    counter, limit = (condition.instructions[name] for name in test.operands)
    if counter.opcode != "get-tuple-element":
        return None
    place = _tuple_place(counter)
    first = _constant(computation, start.operands[place])
    step = _step(body, place)
    if limit.opcode == "get-tuple-element":
        last = _constant(computation, start.operands[_tuple_place(limit)])
    else:
        last = _constant(condition, limit.name)
    if first is None or last is None or not step:
        return None
    return max(0, -(-(last - first) // step))


def _tuple_place(element: Instruction) -> int:
    found = re.search(r"index=(\d+)", element.attributes)
    assert found
    return int(found[1])


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that `name` holds, through copies."""
    instruction = computation.instructions[name]
    if instruction.opcode in ("bitcast", "convert", "copy"):
        return _constant(computation, instruction.operands[0])
    is_integer = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands[0])
    return int(instruction.operands[0]) if is_integer else None


def _step(body: Computation, place: int) -> int | None:
    """What a turn adds to the loop's element number `place`."""
    if body.root.opcode != "tuple":
        return None
    added = body.instructions[body.root.operands[place]]
    if added.opcode != "add":
        return None
    return next((step for name in added.operands if (step := _constant(body, name)) is not None), None)
