"""Word and character errors: substitutions, deletions, insertions, and their rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rapidfuzz.distance import Levenshtein

from audio_grpo.config import NormalizerName
from audio_grpo.text import get_normalizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EditCounts:
    """The fewest edits that turn references into hypotheses; add them up for a corpus (`sum(counts, EditCounts())`)."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    hits: int = 0
    """Reference units that the hypothesis has too."""

    @property
    def errors(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_length(self) -> int:
        """Units of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def hypothesis_length(self) -> int:
        """Units of the hypothesis."""
        return self.hits + self.substitutions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference unit; against an empty reference, the number of inserted units."""
        return self.errors / max(1, self.reference_length)

    def __add__(self, other: Self) -> "EditCounts":
        return EditCounts(
            substitutions=self.substitutions + other.substitutions,
            deletions=self.deletions + other.deletions,
            insertions=self.insertions + other.insertions,
            hits=self.hits + other.hits,
        )


def word_edits(reference: str, hypothesis: str) -> EditCounts:
    """Edits between the words of two normalised texts; white space of any length separates words."""
    return _edits(reference.split(), hypothesis.split())


def character_edits(reference: str, hypothesis: str) -> EditCounts:
    """Edits between the code points of two normalised texts, white space around them left out."""
    return _edits(reference.strip(), hypothesis.strip())


def compute_wer(reference: str, hypothesis: str, normalizer: NormalizerName = "none") -> float:
    """Word error rate of one utterance; for a corpus, sum `word_edits` instead of averaging this.

    Args:
        reference: what was said.
        hypothesis: what was recognised.
        normalizer: applied to both first.

    Returns:
        Errors per reference word, at least 0 and possibly above 1.

    Raises:
        UserError: there is no such normaliser.
    """
    rule = get_normalizer(normalizer)
    return word_edits(rule(reference), rule(hypothesis)).rate


def compute_cer(reference: str, hypothesis: str, normalizer: NormalizerName = "none") -> float:
    """Character error rate of one utterance; as `compute_wer`, by `character_edits`."""
    rule = get_normalizer(normalizer)
    return character_edits(rule(reference), rule(hypothesis)).rate


def _edits(reference: Sequence[str], hypothesis: Sequence[str]) -> EditCounts:
    kinds = [operation.tag for operation in Levenshtein.editops(reference, hypothesis)]
    substitutions, deletions = kinds.count("replace"), kinds.count("delete")
    return EditCounts(
        substitutions=substitutions,
        deletions=deletions,
        insertions=kinds.count("insert"),
        hits=len(reference) - substitutions - deletions,
    )
