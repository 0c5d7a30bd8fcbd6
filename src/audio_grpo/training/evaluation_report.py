"""What an evaluation found: corpus error rates, by language and by duration, and some utterances."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from audio_grpo.config import NormalizerName
from audio_grpo.errors import UserError
from audio_grpo.training.json_lines import decode_record, encode_record


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRates:
    """Edits that turn hypotheses into references, counted over a whole set of clips after normalisation."""

    clips: int
    reference_words: int
    substitutions: int
    """Words heard as another word."""
    deletions: int
    """Words that the hypothesis lacks."""
    insertions: int
    """Words that only the hypothesis has."""
    reference_characters: int
    cer_edits: int
    """Substituted, deleted and inserted characters together."""

    @property
    def word_edits(self) -> int:
        """Substituted, deleted and inserted words together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Corpus word error rate, e.g. 0.153: word edits for each reference word; without any, the word edits."""
        return self.word_edits / max(1, self.reference_words)

    @property
    def cer(self) -> float:
        """Corpus character error rate; without reference characters, the character edits."""
        return self.cer_edits / max(1, self.reference_characters)

    def to_record(self) -> dict[str, Any]:
        """The rates and the counts that they come from."""
        return {"wer": self.wer, "cer": self.cer} | asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """From what `to_record` gave, by the counts alone."""
        return cls(**{each.name: record[each.name] for each in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One clip of an evaluation."""

    id: str
    reference: str
    """As the data has it, before normalisation."""
    hypothesis: str
    """The transcript taken out of the answer; empty where there was none."""
    wer: float
    """Of this utterance alone, after normalisation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """One evaluation: one line of evaluations.jsonl.

    {"stage": "grpo", "step": 60, "text_normalizer": "basic", "text_normalizer_version": "1",
     "wer": 0.153, "cer": 0.061, "clips": 24, ...,
     "by_language": {"Arabic": {"wer": 0.2, ...}}, "by_duration": {"0-2 s": {"wer": 0.1, ...}},
     "utterances": [{"id": "speaker3/17", "reference": "seven lamps", "hypothesis": "seven lamp", "wer": 0.5}]}
    """

    stage: str
    """What was trained before it, e.g. "before sft", "sft", "grpo"; stages are shown in the order they come."""
    step: int
    """Optimizer steps done in that stage."""
    text_normalizer: NormalizerName
    """Name of the normaliser that references and hypotheses went through."""
    text_normalizer_version: str
    """Rates of different versions do not compare."""
    rates: ErrorRates
    """Of all clips."""
    by_language: Mapping[str, ErrorRates] = field(default_factory=dict)
    by_duration: Mapping[str, ErrorRates] = field(default_factory=dict)
    """Buckets such as "0-2 s", in rising order."""
    utterances: tuple[Utterance, ...] = ()
    """The ones worth a look, the best and the worst among them."""

    def to_record(self) -> dict[str, Any]:
        """The line's fields; the rates of all clips lie beside stage and step."""
        return {
            "stage": self.stage,
            "step": self.step,
            "text_normalizer": self.text_normalizer,
            "text_normalizer_version": self.text_normalizer_version,
            **self.rates.to_record(),
            "by_language": {name: rates.to_record() for name, rates in self.by_language.items()},
            "by_duration": {name: rates.to_record() for name, rates in self.by_duration.items()},
            "utterances": [asdict(utterance) for utterance in self.utterances],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """From what `to_record` gave; raises UserError for a record with other fields."""
        try:
            return cls(
                stage=record["stage"],
                step=record["step"],
                text_normalizer=record["text_normalizer"],
                text_normalizer_version=record["text_normalizer_version"],
                rates=ErrorRates.from_record(record),
                by_language=_rates_by_name(record["by_language"]),
                by_duration=_rates_by_name(record["by_duration"]),
                utterances=tuple(Utterance(**utterance) for utterance in record["utterances"]),
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"An evaluation of stage {record.get('stage')!r} does not have the fields of an evaluation ({error}): "
                "evaluations.jsonl was changed or comes from another version. Evaluate again."
            ) from error

    def to_json(self) -> str:
        """One line of JSON."""
        return encode_record(self.to_record())

    @classmethod
    def from_json(cls, line: str) -> Self:
        """From what `to_json` gave; raises UserError for other fields, ValueError for anything but a JSON object."""
        return cls.from_record(decode_record(line))


def _rates_by_name(records: Mapping[str, Any]) -> dict[str, ErrorRates]:
    return {name: ErrorRates.from_record(record) for name, record in records.items()}
