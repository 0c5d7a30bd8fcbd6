"""What is in a data set: counts, hours, languages, lengths, a look at the first records."""

from dataclasses import dataclass, field

import numpy as np
from etils import epath

from audio_grpo.data.records import decode_record, load_samples
from audio_grpo.data.source import RecordSource, StoredRecord, Unusable
from audio_grpo.errors import UserError

PERCENTILES = (0, 10, 50, 90, 99, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLook:
    """One record, for the eye."""

    id: str | None
    seconds: float
    sampling_rate: int
    """Hz, as stored."""
    text: str
    language: str | None


@dataclass(slots=True, kw_only=True)
class LanguageShare:
    """Records in one language."""

    records: int = 0
    hours: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What `data inspect` prints; `dataclasses.asdict` makes it JSON."""

    records: int
    """Usable and unusable ones."""
    hours: float
    """Of the usable ones."""
    seconds_percentiles: dict[str, float]
    """Duration in seconds by percentile, e.g. {"p50": 4.2}; empty without usable records."""
    languages: dict[str, LanguageShare]
    """By the records' language, "unknown" where they state none; the largest first."""
    unusable: dict[str, list[str]]
    """Reason to record names."""
    first: list[RecordLook] = field(default_factory=list)


def inspect(path: epath.PathLike, *, look: int = 5) -> DataSummary:
    """Decodes every record of a folder, file or glob and sums them up; shows the first `look` of them.

    Raises UserError where there is no readable data set at all.
    """
    source = RecordSource(path)
    looks: list[RecordLook] = []
    seconds: list[float] = []
    languages: dict[str, LanguageShare] = {}
    unusable: dict[str, list[str]] = {}
    for index in range(len(source)):
        record = _look(source[index])
        if isinstance(record, Unusable):
            unusable.setdefault(record.reason, []).append(record.name)
            continue
        looks += [record] if len(looks) < look else []
        seconds.append(record.seconds)
        share = languages.setdefault(record.language or "unknown", LanguageShare())
        share.records += 1
        share.hours += record.seconds / 3600
    values = np.percentile(seconds, PERCENTILES) if seconds else []
    return DataSummary(
        records=len(source),
        hours=sum(seconds) / 3600,
        seconds_percentiles={f"p{p}": round(float(value), 3) for p, value in zip(PERCENTILES, values, strict=False)},
        languages=dict(sorted(languages.items(), key=lambda item: -item[1].hours)),
        unusable=unusable,
        first=looks,
    )


def _look(stored: StoredRecord | Unusable) -> RecordLook | Unusable:
    if isinstance(stored, Unusable):
        return stored
    name = stored.name
    try:
        record = decode_record(stored.content)
        name = record.id or name
        samples, rate = load_samples(record)
    except UserError as error:
        return Unusable(name, str(error))
    return RecordLook(
        id=record.id, seconds=len(samples) / rate, sampling_rate=rate, text=record.text, language=record.language
    )
