"""Tokens, prompts, answers and comparable transcripts."""

from audio_grpo.text.answers import ParsedAnswer, extract_transcription, forced_language, parse_answer
from audio_grpo.text.normalizers import Normalizer, get_normalizer
from audio_grpo.text.prompts import ReasoningTags, build_prompt, target_text, target_tokens
from audio_grpo.text.special_tokens import family_special_tokens
from audio_grpo.text.tokenizer import Tokenizer
from audio_grpo.text.tokenizer_files import load_tokenizer

__all__ = [
    "Normalizer",
    "ParsedAnswer",
    "ReasoningTags",
    "Tokenizer",
    "build_prompt",
    "extract_transcription",
    "family_special_tokens",
    "forced_language",
    "get_normalizer",
    "load_tokenizer",
    "parse_answer",
    "target_text",
    "target_tokens",
]
