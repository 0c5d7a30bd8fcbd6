"""The iterator over batches, whose place can be kept."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from audio_grpo.data.skipping import SkippingAccount
from audio_grpo.errors import UserError
from audio_grpo.types import SkippedRecords

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several processes reads of every batch, and how it comes to know the rest."""

    rows: Int[np.ndarray, "n"]
    """Of the batch, rising."""
    gather: Callable[[Callable[[], Batch | None]], Batch | None]
    """Reads this process's rows by what it is given, and returns the whole batch, which all processes get; None where
    there are no more."""


class AudioDataIterator(Iterator[Batch]):
    """Batches, and the place among them.

    An iterator that is made alike and takes over a state yields the batches that would have come next, bit for bit,
    into however many processes both share the batches out.
    """

    def __init__(
        self,
        read: Callable[[int], grain.DatasetIterator],
        account: SkippingAccount,
        identity: dict[str, int],
        share: Share | None = None,
    ) -> None:
        """`read` starts from the batch of the given number; `identity` is what a state only fits to."""
        self._read = read
        self._account = account
        self._identity = identity
        self._share = share
        self._taken = 0
        self._batches = read(0)

    @property
    def skipped(self) -> SkippedRecords:
        """Records of the first epoch that were left out so far, by all processes."""
        return self._account.skipped

    def __next__(self) -> Batch:
        batch = self._next_own() if self._share is None else self._share.gather(self._next_own)
        if batch is None:
            raise StopIteration
        self._account.note(batch.pop("unusable"))
        self._taken += 1
        return batch

    def get_state(self) -> bytes:
        """JSON that says where the next batch begins; the same in all processes."""
        skipped = {"seen": self.skipped.seen, "reasons": self.skipped.reasons}
        return json.dumps({"identity": self._identity, "batches": self._taken, "skipped": skipped}).encode()

    def set_state(self, state: bytes) -> None:
        """Takes over the place of `get_state`. Raises UserError where data, seed or batch size differ from then."""
        then = json.loads(state)
        differing = [
            f"{key} was {then['identity'].get(key)} and is {now}"
            for key, now in self._identity.items()
            if then["identity"].get(key) != now
        ]
        if differing:
            raise UserError(f"The data can not go on from where it stopped: {', '.join(differing)}")
        self.close()
        self._taken = then["batches"]
        self._batches = self._read(self._taken)
        self.skipped.seen, self.skipped.reasons = then["skipped"]["seen"], then["skipped"]["reasons"]

    def close(self) -> None:
        """Ends reading threads and worker processes."""
        self._batches.close()

    def _next_own(self) -> Batch | None:
        return next(self._batches, None)
