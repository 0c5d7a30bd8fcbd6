"""What goes wrong with answers in ways that an error rate does not tell apart."""

import re
import unicodedata
from collections import Counter

_LOOP = re.compile(r"(..{1,63}?)\1{3}", re.DOTALL)
"""A unit of 2 to 64 characters, four times in a row."""

_JAPANESE = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}
"""Japanese is written in three scripts at once."""


def falls_into_loop(text: str, reference: str) -> bool:
    """Whether a text says something four times in a row and its reference nothing.

    Any text of 2 to 64 characters counts, so that languages that write no spaces are judged alike. The whole of what
    was written is to be given: a loop that goes on to the last token leaves no answer.
    """
    return _loops(text) and not _loops(reference)


def is_in_wrong_script(text: str, reference: str) -> bool:
    """Whether most of a text's letters are of another script than its reference's, e.g. Latin for Arabic.

    Where a reference mixes scripts, those that the text has in the same share are right. False where either has no
    letters. Kana and Chinese characters count as one script.
    """
    written, expected = _scripts(text), _scripts(reference)
    if not written or not expected:
        return False
    shared = sum(min(written[script] * expected.total(), expected[script] * written.total()) for script in expected)
    return 2 * shared < written.total() * expected.total()


def _loops(text: str) -> bool:
    # The space gives the last word of a text the end that the words before it have.
    return _LOOP.search(f"{text.casefold()} ") is not None


def _scripts(text: str) -> Counter[str]:
    """Letters by script, which is the first word of a letter's name."""
    letters = [letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter)[0] == "L"]
    names = [unicodedata.name(letter, "UNNAMED").split(maxsplit=1)[0] for letter in letters]
    return Counter(_JAPANESE.get(name, name) for name in names)
