"""Text to token ids and back, over the `tokenizers` library."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers

from audio_grpo.config import DecoderBlock
from audio_grpo.errors import UserError
from audio_grpo.text.special_tokens import special_tokens
from audio_grpo.types import SpecialTokens


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level tokenizer of the Qwen3 family."""

    name: str
    """As it was asked for, e.g. "Qwen/Qwen3-ASR-0.6B"."""
    backend: tokenizers.Tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included, e.g. 151676; a model's vocabulary may be larger."""
        return self.backend.get_vocab_size()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides about ids; equal tokenizers of one library version share it."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The text's ids, nothing added; the names of added tokens become those tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The ids' text; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids below `vocab_size`.
            skip_special_tokens: leave out control tokens such as `<|im_end|>`; `<asr_text>` and `<think>` stay.

        Raises:
            ValueError: an id has no token.
        """
        size = self.vocab_size
        wrong = [id_ for id_ in ids if not 0 <= id_ < size]
        if wrong:
            raise ValueError(f"The tokenizer {self.name} has ids from 0 to {size - 1}, but {wrong[0]} is to be decoded")
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int:
        """The id of one token by its name, e.g. 151645 for "<|im_end|>".

        Raises:
            UserError: there is no such token.
        """
        id_ = self.backend.token_to_id(token)
        if id_ is None:
            raise UserError(f"The tokenizer {self.name} has no token {token}: give one of Qwen3-Omni or Qwen3-ASR")
        return id_

    def special_tokens(self, decoder_block: DecoderBlock, vocab_size: int) -> SpecialTokens:
        """The tokens that play a part in prompts and sampling.

        Args:
            decoder_block: the model's family.
            vocab_size: the model's vocabulary, which may have rows beyond the tokenizer's.

        Raises:
            UserError: a token is missing, or the model's vocabulary is smaller than the tokenizer's.
        """
        return special_tokens(self.backend.get_added_tokens_decoder(), decoder_block, vocab_size)
