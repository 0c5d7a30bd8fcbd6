"""The iterator over batches, whose place can be kept."""

import json
from collections.abc import Iterator
from typing import Any

import grain

from audio_grpo.data.skipping import SkipUnusable
from audio_grpo.errors import UserError
from audio_grpo.types import SkippedRecords


class AudioDataIterator(Iterator[dict[str, Any]]):
    """Batches, and the place among them.

    An iterator that is made alike and takes over a state yields the batches that would have come next, bit for bit.
    """

    def __init__(self, batches: grain.IterDataset, skip: SkipUnusable, identity: dict[str, int]) -> None:
        """`identity` is what a state only fits to."""
        self._batches = iter(batches)
        self._skip = skip
        self._identity = identity

    @property
    def skipped(self) -> SkippedRecords:
        """Records of the first epoch that were left out so far."""
        return self._skip.skipped

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)

    def get_state(self) -> bytes:
        """JSON that says where the next batch begins."""
        skipped = {"seen": self.skipped.seen, "reasons": self.skipped.reasons}
        state = {"identity": self._identity, "position": self._batches.get_state(), "skipped": skipped}
        return json.dumps(state).encode()

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
        self._batches.set_state(then["position"])
        self.skipped.seen, self.skipped.reasons = then["skipped"]["seen"], then["skipped"]["reasons"]

    def close(self) -> None:
        """Ends reading threads and worker processes."""
        self._batches.close()
