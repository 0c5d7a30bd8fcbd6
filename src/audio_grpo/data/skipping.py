"""Leaving out unusable records, with an account of them."""

from collections.abc import Sequence

from audio_grpo.data.source import Unusable
from audio_grpo.errors import UserError
from audio_grpo.types import SkippedRecords

_SMALL_SAMPLE = 1000
"""Below this many records the share is judged as if so many had been seen: a small share fluctuates."""
_SHOWN_NAMES = 5


class SkippingAccount:
    """Accounts for the unusable records of the first epoch, each record once.

    Raises UserError with all reasons as soon as more than `max_fraction` of the records turn out unusable, or when
    none of the data set is usable.
    """

    def __init__(self, max_fraction: float, epoch: int) -> None:
        self.skipped = SkippedRecords()
        self._max_fraction = max_fraction
        self._epoch = epoch

    def note(self, records: Sequence[Unusable | None]) -> None:
        """Takes note of the next records, None for a usable one."""
        for unusable in records[: self._epoch - self.skipped.seen]:
            self.skipped.seen += 1
            if unusable:
                self.skipped.reasons.setdefault(unusable.reason, []).append(unusable.name)
                self._require_few()

    def _require_few(self) -> None:
        seen, skipped = self.skipped.seen, sum(map(len, self.skipped.reasons.values()))
        judged = max(seen, min(self._epoch, _SMALL_SAMPLE))
        if skipped == self._epoch:
            raise UserError(f"No record is usable:\n{describe(self.skipped)}")
        if skipped > self._max_fraction * judged:
            raise UserError(
                f"{skipped} of the first {seen} records are unusable, of {self._epoch} in all; max_skipped_fraction is "
                f"{self._max_fraction}. Mend the data, or raise the limits named here:\n{describe(self.skipped)}"
            )


def describe(skipped: SkippedRecords) -> str:
    """One line for each reason: how many records and the first of their names."""
    return "\n".join(
        f"  {len(names)} × {reason}: {', '.join(names[:_SHOWN_NAMES])}{', …' if len(names) > _SHOWN_NAMES else ''}"
        for reason, names in skipped.reasons.items()
    )
