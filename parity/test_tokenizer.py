"""Our tokenizer against transformers' own, on 20,000 random and 1,000 composed strings."""

import random

import pytest
from transformers import Qwen2Tokenizer

from audio_grpo.text import Tokenizer, load_tokenizer
from audio_grpo.text.byte_pairs import qwen_byte_pairs
from audio_grpo.text.special_tokens import FAMILY_TOKENS

RANDOM, COMPOSED = 20_000, 1_000

_RANGES = {
    "latin": (0x20, 0x250),
    "arabic": (0x600, 0x700),
    "harakat": (0x64B, 0x653),
    "cyrillic": (0x400, 0x500),
    "devanagari": (0x900, 0x980),
    "thai": (0xE00, 0xE80),
    "hangul": (0xAC00, 0xD7A4),
    "kana": (0x3040, 0x3100),
    "han": (0x4E00, 0xA000),
    "combining": (0x300, 0x370),
    "punctuation": (0x2000, 0x2070),
    "emoji": (0x1F300, 0x1FAFF),
    "anything": (0x0, 0x30000),
}
_PIECES = [
    *("The quick brown fox", "don't", "I'LL", "we've", "it's", "CO₂", "3.14159", "1234567890", "٠١٢٣٤٥", "१२३"),
    *("السلام عليكم", "السَّلَامُ عَلَيْكُمْ", "مُحَمَّدٌ", "ـــ", "لا", "؟", "،", "پژواک", "ڤيديو"),
    *("你好，世界", "日本語のテキスト", "안녕하세요", "Привет", "नमस्ते", "สวัสดี", "שָׁלוֹם"),
    *("👩‍👩‍👧‍👦", "🇸🇦", "❤️", "🤷🏽‍♂️", "é", "é", "ﬁ", "Å", "ß", "İ", "\u200b", "\ufeff"),
    *(" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n \n", " \t ", "\u00a0", "\u3000"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|audio_pad|>", "<think>", "</think>", "<tool_call>"),
    *("<|im_", "|>", "<answer>", "</answer>", "<reasoning>", "...", "!?", "--", "http://a.b/c?d=e&f=1", "x=[1,2];"),
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return load_tokenizer("Qwen/Qwen3-Omni-30B-A3B-Instruct")


@pytest.fixture(scope="module")
def reference() -> Qwen2Tokenizer:
    vocabulary, merges = qwen_byte_pairs()
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens([token for token in FAMILY_TOKENS["qwen3_omni"] if token.content != "<|endoftext|>"])
    return tokenizer


def random_strings() -> list[str]:
    rng = random.Random(0)
    strings = []
    for _ in range(RANDOM):
        first, last = rng.choice(list(_RANGES.values()))
        codes = (rng.randrange(first, last) for _ in range(rng.randrange(1, 40)))
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        strings.append(text + rng.choice(["", " ", "\n", " a", "1"]))
    return strings


def composed_strings() -> list[str]:
    rng = random.Random(1)
    single = [*_PIECES, *(f" {piece}" for piece in _PIECES), *(f"{piece}\n" for piece in _PIECES)]
    joined = ("".join(rng.choices([*_PIECES, " "], k=rng.randrange(2, 9))) for _ in range(COMPOSED - len(single)))
    return [*single, *joined]


@pytest.mark.parametrize("strings", [random_strings, composed_strings])
def test_ids_and_texts_are_the_references(ours, reference, strings):
    texts = strings()
    assert len(texts) == (RANDOM if strings is random_strings else COMPOSED)
    expected = reference(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids), repr(text)
        assert ours.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True), repr(text)
