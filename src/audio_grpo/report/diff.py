"""What a hypothesis did to its reference, word by word."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rapidfuzz.distance import Levenshtein

from audio_grpo.report.markup import Content, Html, tag
from audio_grpo.text.normalizers import Normalizer

EditKind = Literal["equal", "replace", "delete", "insert"]

_CLASSES: dict[EditKind, str] = {"replace": "substituted", "delete": "deleted", "insert": "inserted"}


class Edit(NamedTuple):
    """One word's fate; "" stands for the side that has no word."""

    kind: EditKind
    reference: str
    hypothesis: str


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Edit]:
    """The fewest edits between the two, in reading order."""
    edits: list[Edit] = []
    for step in Levenshtein.opcodes(reference, hypothesis):
        spoken = reference[step.src_start : step.src_end]
        heard = hypothesis[step.dest_start : step.dest_end]
        if step.tag == "delete":
            edits += [Edit("delete", word, "") for word in spoken]
        elif step.tag == "insert":
            edits += [Edit("insert", "", word) for word in heard]
        else:
            kind: EditKind = "equal" if step.tag == "equal" else "replace"
            edits += [Edit(kind, *pair) for pair in zip(spoken, heard, strict=True)]
    return edits


def diff(reference: str, hypothesis: str, normalizer: Normalizer) -> Html:
    """The normalised hypothesis with its edits marked, so that the marks are the errors that WER counts.

    Args:
        reference: The transcript.
        hypothesis: What was heard.
        normalizer: Of both; "cjk" leaves no spaces, so its units are characters.
    """
    spoken, heard = normalizer(reference), normalizer(hypothesis)
    if normalizer.name == "cjk":
        edits, space = align(spoken, heard), ""
    else:
        edits, space = align(spoken.split(), heard.split()), " "
    words = [piece for edit in edits for piece in (_word(edit), space)]
    return tag("p", *words, dir="auto", class_="diff")


def legend() -> Html:
    """What the marks mean."""
    return tag(
        "p",
        tag("span", tag("del", "spoken"), tag("ins", "heard"), " substituted", class_="substituted"),
        tag("span", tag("del", "spoken"), " deleted", class_="deleted"),
        tag("span", tag("ins", "heard"), " inserted", class_="inserted"),
        class_="legend",
    )


def _word(edit: Edit) -> Content:
    if edit.kind == "equal":
        return edit.hypothesis
    spoken = tag("del", edit.reference) if edit.reference else None
    heard = tag("ins", edit.hypothesis) if edit.hypothesis else None
    return tag("span", spoken, heard, class_=_CLASSES[edit.kind])
