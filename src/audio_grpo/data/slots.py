"""Which record each row of each batch holds, whatever number of processes reads them.

Row r of batch k is slot k · B + r. A process can make any slot without knowing any other one: the place of an unusable
record is filled within its slot, so that what one process leaves out moves nothing in another one's rows.
"""

import abc
import sys
from functools import cached_property
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from audio_grpo.data.source import Unusable
from audio_grpo.errors import UserError

_MOST_CANDIDATES = 1000
"""Records tried for one slot; so many unusable ones in a row are no chance."""


class _Slots(abc.ABC):
    """A process's rows of all batches, one after the other: a random-access source for Grain."""

    def __init__(self, records: grain.MapDataset, batch_size: int, rows: Int[np.ndarray, "n"]) -> None:
        """`records` gives prompts or `Unusable`."""
        self._records = records
        self._batch_size = batch_size
        self._rows = rows.tolist()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A prompt, with `unusable`: the record that should have been here, or None where the prompt is its own."""
        batch, row = divmod(index, len(self._rows))
        return self._slot(batch * self._batch_size + self._rows[row])

    @abc.abstractmethod
    def _slot(self, number: int) -> dict[str, Any]: ...

    def _first_usable(self, numbers: range) -> dict[str, Any]:
        reasons = {}
        for number in numbers[:_MOST_CANDIDATES]:
            candidate: Any = self._records[number]
            if not isinstance(candidate, Unusable):
                return candidate
            reasons[candidate.reason] = candidate.name
        raise UserError(
            "No record is usable of all that were tried, for these reasons: "
            + "; ".join(f"{reason} (such as {name})" for reason, name in reasons.items())
        )


class TrainingSlots(_Slots):
    """Epoch after epoch; an unusable record is replaced by the one that comes at its place in the next epoch."""

    def __init__(self, records: grain.MapDataset, batch_size: int, rows: Int[np.ndarray, "n"], *, epoch: int) -> None:
        """`records` goes on for ever, shuffled anew after each `epoch` of them."""
        super().__init__(records, batch_size, rows)
        self._epoch = epoch

    def __len__(self) -> int:
        return sys.maxsize

    def _slot(self, number: int) -> dict[str, Any]:
        own: Any = self._records[number]
        if not isinstance(own, Unusable):
            return {**own, "unusable": None}
        return {**self._first_usable(range(number + self._epoch, sys.maxsize, self._epoch)), "unusable": own}


class EvaluationSlots(_Slots):
    """Each record once, in order, up to the end of a batch; `valid` tells slots that only fill up."""

    def __len__(self) -> int:
        return -(-len(self._records) // self._batch_size) * len(self._rows)

    def _slot(self, number: int) -> dict[str, Any]:
        own: Any = self._records[number] if number < len(self._records) else None
        if own is not None and not isinstance(own, Unusable):
            return {**own, "valid": np.bool_(True), "unusable": None}
        return {**self._filler, "valid": np.bool_(False), "unusable": own}

    @cached_property
    def _filler(self) -> dict[str, Any]:
        return self._first_usable(range(len(self._records)))
