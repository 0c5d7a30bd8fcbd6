"""Named, versioned rules that make transcripts comparable; the same object serves rewards and evaluation."""

import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import get_args

from audio_grpo.config import NormalizerName
from audio_grpo.errors import UserError


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Text in, comparable text out; stored with every result by name and version."""

    name: NormalizerName
    version: str
    """Changes whenever the same text may come out differently."""
    rule: Callable[[str], str]

    def __call__(self, text: str) -> str:
        """The normalised text."""
        return self.rule(text)


@cache
def get_normalizer(name: NormalizerName) -> Normalizer:
    """The normaliser of that name; what each does is said at its function.

    "whisper-english" and "whisper-basic" are Whisper's own, with the version of the package that holds them. The basic
    one takes words with Arabic or Indic vowel marks apart, and both delete text in round and angle brackets.

    Raises:
        UserError: there is no such normaliser.
    """
    if name == "whisper-english":
        from whisper_normalizer.english import EnglishTextNormalizer

        return Normalizer(name, version("whisper-normalizer"), EnglishTextNormalizer())
    if name == "whisper-basic":
        from whisper_normalizer.basic import BasicTextNormalizer

        return Normalizer(name, version("whisper-normalizer"), BasicTextNormalizer())
    if name not in _RULES:
        raise UserError(f"There is no text normaliser {name!r}: take one of {', '.join(get_args(NormalizerName))}")
    return Normalizer(name, "1", _RULES[name])


def _none(text: str) -> str:
    """The text as it is."""
    return text


def _basic(text: str) -> str:
    """NFKC, casefold, punctuation and symbols replaced by spaces, except apostrophes inside words."""
    text = text.translate(_APOSTROPHES)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    around = zip(text, " " + text, text[1:] + " ", strict=False)
    kept = (letter if _stays(letter, before, after) else " " for letter, before, after in around)
    return " ".join("".join(kept).split())


def _stays(letter: str, before: str, after: str) -> bool:
    if letter == "'":
        return _in_word(before) and _in_word(after)
    return unicodedata.category(letter)[0] not in "PS"


def _in_word(letter: str) -> bool:
    return unicodedata.category(letter)[0] in "LMN"


def _cjk(text: str) -> str:
    """As "basic", and without spaces: for character error rates of scripts that write none."""
    return unicodedata.normalize("NFC", _basic(text).replace(" ", ""))


def _arabic_leaderboard(text: str) -> str:
    """The Open Universal Arabic ASR Leaderboard's rules: ى, ة and tatweel stay."""
    return text.translate(_LEADERBOARD).strip()


def _arabic_extended(text: str) -> str:
    """As the leaderboard's, and ى as ي, ة as ه, no tatweel."""
    return _arabic_leaderboard(text).translate(_EXTENDED).strip()


_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ´`", "'"))
_VOWEL_MARKS = "".join(map(chr, range(0x064B, 0x0653)))
_LEADERBOARD = str.maketrans("پڤآأإؤئ٠١٢٣٤٥٦٧٨٩", "بفاااوي0123456789", f"{string.punctuation}،؛؟ء{_VOWEL_MARKS}")
_EXTENDED = str.maketrans("ىة", "يه", "ـ")

_RULES: dict[NormalizerName, Callable[[str], str]] = {
    "none": _none,
    "basic": _basic,
    "cjk": _cjk,
    "arabic-leaderboard": _arabic_leaderboard,
    "arabic-extended": _arabic_extended,
}
