"""Which completion decodes in which slot: decisions only, no device."""

from collections import deque
from dataclasses import dataclass

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


class Scheduler:
    """Hands `prompts` × `generations` completions to decode slots and their prompts to rows of the prompt cache.

    A slot takes its next completion as soon as it is free: from the longest resident prompt first, else from the next
    prompt, which takes a free row. A row is freed when its prompt's last completion is done.
    """

    def __init__(self, *, slots: int, rows: int, prompts: int, generations: int) -> None:
        self._pending = deque(range(prompts))
        self._generations = generations
        self._residents: dict[int, _Resident] = {}
        self._free_rows = list(range(rows))[::-1]
        self._free_slots = list(range(slots))[::-1]
        self.running: dict[int, Start] = {}
        """What decodes in each busy slot."""

    @property
    def done(self) -> bool:
        """All completions have finished."""
        return not (self._pending or self._residents)

    def admit(self) -> tuple[list[Prefill], list[Start]]:
        """Fill free slots; the prefills come before the starts that read them."""
        prefills: list[Prefill] = []
        starts: list[Start] = []
        while self._free_slots:
            row = next((r for r, x in self._residents.items() if x.next_sample < self._generations), None)
            if row is None:
                if not (self._pending and self._free_rows):
                    break
                row = self._free_rows.pop()
                self._residents[row] = _Resident(self._pending.popleft(), unfinished=self._generations)
                prefills.append(Prefill(row, self._residents[row].prompt))
            resident = self._residents[row]
            start = Start(self._free_slots.pop(), row, resident.prompt, resident.next_sample)
            resident.next_sample += 1
            self.running[start.slot] = start
            starts.append(start)
        return prefills, starts

    def finish(self, slot: int) -> Start:
        """Free a slot; returns what ran there."""
        start = self.running.pop(slot)
        self._free_slots.append(slot)
        resident = self._residents[start.row]
        resident.unfinished -= 1
        if resident.unfinished == 0:
            del self._residents[start.row]
            self._free_rows.append(start.row)
        return start


def membership(
    running: dict[int, Start], *, slots: int, rows: int, width: int
) -> tuple[Int32[np.ndarray, "R W"], Int32[np.ndarray, "S"]]:
    """Slots that read each row, and each slot's place in that table; idle slots take place 0, which none reads."""
    members = np.zeros((rows, width), np.int32)
    place = np.zeros(slots, np.int32)
    filled = np.zeros(rows, np.int32)
    for slot, start in running.items():
        members[start.row, filled[start.row]] = slot
        place[slot] = start.row * width + filled[start.row]
        filled[start.row] += 1
    return members, place
