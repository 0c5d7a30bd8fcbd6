"""Which completion decodes in which slot: decisions only, no device."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt to be run into a row of the prompt cache."""

    row: int
    prompt: int


@dataclass(frozen=True, slots=True)
class Start:
    """Completion that begins to decode in a slot, reading its prompt from a row."""

    slot: int
    row: int
    prompt: int
    sample: int


@dataclass(slots=True)
class _Resident:
    prompt: int
    next_sample: int = 0
    unfinished: int = 0


@dataclass(slots=True)
class _Part:
    free_slots: list[int]
    free_rows: list[int]
    residents: dict[int, _Resident] = field(default_factory=dict)
    """By row."""


class Scheduler:
    """Hands `prompts` × `generations` completions to decode slots and their prompts to rows of the prompt cache.

    A slot takes its next completion as soon as it is free: from the longest resident prompt first, else from the next
    prompt, which takes a free row. A row is freed when its prompt's last completion is done. Slots and rows come in
    equal consecutive `parts`, one for each device that holds some; a slot reads rows of its own part only.
    """

    def __init__(self, *, slots: int, rows: int, prompts: int, generations: int, parts: int = 1) -> None:
        self._pending = deque(range(prompts))
        self._generations = generations
        self._parts = [
            _Part(free_slots=_descending(slots, parts, part), free_rows=_descending(rows, parts, part))
            for part in range(parts)
        ]
        self._part_of_slot = slots // parts
        self.running: dict[int, Start] = {}
        """What decodes in each busy slot."""

    @property
    def done(self) -> bool:
        """All completions have finished."""
        return not (self._pending or any(part.residents for part in self._parts))

    def admit(self) -> tuple[list[Prefill], list[Start]]:
        """Fill free slots; the prefills come before the starts that read them."""
        prefills: list[Prefill] = []
        starts: list[Start] = []
        for part in self._parts:
            while part.free_slots:
                row = next((r for r, x in part.residents.items() if x.next_sample < self._generations), None)
                if row is None:
                    if not (self._pending and part.free_rows):
                        break
                    row = part.free_rows.pop()
                    part.residents[row] = _Resident(self._pending.popleft(), unfinished=self._generations)
                    prefills.append(Prefill(row, part.residents[row].prompt))
                resident = part.residents[row]
                start = Start(part.free_slots.pop(), row, resident.prompt, resident.next_sample)
                resident.next_sample += 1
                self.running[start.slot] = start
                starts.append(start)
        return prefills, starts

    def finish(self, slot: int) -> Start:
        """Free a slot; returns what ran there."""
        start, part = self.running.pop(slot), self._parts[slot // self._part_of_slot]
        part.free_slots.append(slot)
        resident = part.residents[start.row]
        resident.unfinished -= 1
        if resident.unfinished == 0:
            del part.residents[start.row]
            part.free_rows.append(start.row)
        return start


def _descending(count: int, parts: int, part: int) -> list[int]:
    size = count // parts
    return list(range(part * size, (part + 1) * size))[::-1]


def membership(
    running: dict[int, Start], *, slots: int, rows: int, width: int, parts: int = 1
) -> tuple[Int32[np.ndarray, "P R W"], Int32[np.ndarray, "P S"]]:
    """Slots that read each row, and each slot's place in that table, counted within their part.

    Idle slots take place 0, which none reads.
    """
    slots, rows = slots // parts, rows // parts
    members = np.zeros((parts, rows, width), np.int32)
    place = np.zeros((parts, slots), np.int32)
    filled = np.zeros((parts, rows), np.int32)
    for slot, start in running.items():
        (part, slot), row = divmod(slot, slots), start.row % rows
        members[part, row, filled[part, row]] = slot
        place[part, slot] = row * width + filled[part, row]
        filled[part, row] += 1
    return members, place
