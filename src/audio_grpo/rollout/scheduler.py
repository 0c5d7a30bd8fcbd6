"""Which prompt lies in which row of the prompt cache: decisions only, no device."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int32


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt to be run into a row of a part of the prompt cache."""

    part: int
    row: int
    """Within the part."""
    prompt: int


@dataclass(slots=True)
class _Part:
    free_rows: list[int]
    ring: Int32[np.ndarray, "r"]
    lined_up: int = 0
    """Prompts put in the ring since the start."""
    residents: dict[int, int] = field(default_factory=dict)
    """Prompt in each busy row."""


class Scheduler:
    """Hands prompts to rows, which come in equal parts, and lines up their completions for the device's queues.

    A row is freed when the host has seen all its completions done.
    """

    def __init__(self, *, parts: int, rows: int, prompts: int, generations: int) -> None:
        self._pending = deque(range(prompts))
        self._generations = generations
        of_part = rows // parts
        self._parts = [_Part(list(range(of_part))[::-1], np.zeros(of_part, np.int32)) for _ in range(parts)]
        self._cancelled = np.zeros((parts, of_part, generations), bool)

    @property
    def done(self) -> bool:
        """No prompt is waiting or in a row."""
        return not (self._pending or any(part.residents for part in self._parts))

    @property
    def residents(self) -> dict[tuple[int, int], int]:
        """Prompt in each busy row, by part and row."""
        return {(p, row): prompt for p, part in enumerate(self._parts) for row, prompt in part.residents.items()}

    def admit(self) -> list[Prefill]:
        """Take waiting prompts into free rows, of the part that has most of them first."""
        prefills = []
        while self._pending:
            index = max(range(len(self._parts)), key=lambda p: (len(self._parts[p].free_rows), -p))
            part = self._parts[index]
            if not part.free_rows:
                break
            row = part.free_rows.pop()
            part.residents[row] = self._pending.popleft()
            part.ring[part.lined_up % len(part.ring)] = row
            part.lined_up += 1
            self._cancelled[index, row] = False
            prefills.append(Prefill(index, row, part.residents[row]))
        return prefills

    def free(self, part: int, row: int) -> None:
        """Give up a row whose completions are all done."""
        del self._parts[part].residents[row]
        self._parts[part].free_rows.append(row)

    def cancel(self, prompt: int) -> bool:
        """Drop a prompt that waits, and end the completions of one that does not; returns whether it waited."""
        if prompt in self._pending:
            self._pending.remove(prompt)
            return True
        for (part, row), resident in self.residents.items():
            if resident == prompt:
                self._cancelled[part, row] = True
        return False

    def end(self, part: int, row: int, sample: int) -> None:
        """End one of the completions of the prompt in a row."""
        self._cancelled[part, row, sample] = True

    def queue(
        self,
    ) -> tuple[Int32[np.ndarray, "P r"], Int32[np.ndarray, "P"], Bool[np.ndarray, "P r G"], Bool[np.ndarray, ""]]:
        """Ring, end and cancelled completions of each part, and whether no prompt waits: fields of `state.Queue`."""
        ring = np.stack([part.ring for part in self._parts])
        end = np.asarray([part.lined_up * self._generations for part in self._parts], np.int32)
        return ring, end, self._cancelled.copy(), np.asarray(not self._pending)
