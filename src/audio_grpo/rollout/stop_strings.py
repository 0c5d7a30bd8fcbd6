"""Strings that end a completion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32


@dataclass(frozen=True, slots=True)
class StopStrings:
    """Finds strings in the text of tokens, however it is cut into tokens; true if there are any to find."""

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def __bool__(self) -> bool:
        return bool(self.strings)

    def end(self, tokens: Int32[np.ndarray, "C"]) -> int | None:
        """The fewest first tokens whose text has one of the strings; None where all of them have none."""
        ids = tokens.tolist()
        if not self._in(ids):
            return None
        return next(count for count in range(1, len(ids) + 1) if self._in(ids[:count]))

    def _in(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids) if self.strings else ""
        return any(string in text for string in self.strings)
