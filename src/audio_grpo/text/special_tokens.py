"""The Qwen3 family's added tokens, and which of them plays which part."""

from collections.abc import Iterable, Mapping

from tokenizers import AddedToken

from audio_grpo.config import DecoderBlock
from audio_grpo.errors import UserError
from audio_grpo.types import SpecialTokens

RANKS = 151_643
"""Ids below the added tokens, in every member of the family."""

ASR_TEXT = "<asr_text>"
"""Stands between the language and the transcript in Qwen3-ASR's answers."""

_SHARED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<tts_pad>",
    "<tts_text_bos>",
    "<tts_text_eod>",
    "<tts_text_bos_single>",
]
_BLANKS = [f"<blank{number}>" for number in range(1, 28)]
_PLAIN = {
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<non_speech>", ASR_TEXT),
}
"""Added tokens that are text all the same: they stay in what is decoded and may be sampled."""


def added_tokens(names: Iterable[str]) -> list[AddedToken]:
    """Tokens of the family as the `tokenizers` library takes them."""
    return [AddedToken(name, special=name not in _PLAIN, normalized=False) for name in names]


FAMILY_TOKENS: Mapping[DecoderBlock, list[AddedToken]] = {
    "qwen3_omni": added_tokens([*_SHARED, "<|audio_pad|>"]),
    "qwen3_asr": added_tokens([*_SHARED, "<non_speech>", "<|audio_pad|>", *_BLANKS, ASR_TEXT]),
}
"""In id order from `RANKS` on."""

TINY_TOKENS = added_tokens([*_SHARED, "<|audio_pad|>", ASR_TEXT])
"""What the prompts of both families need."""


def family_special_tokens(decoder_block: DecoderBlock, vocab_size: int) -> SpecialTokens:
    """The published ids, for prompts that come as token ids and need no tokenizer.

    Args:
        decoder_block: the model's family.
        vocab_size: the model's vocabulary, rows without a token included, e.g. 152064.

    Raises:
        UserError: the vocabulary ends below the family's last token.
    """
    return special_tokens(dict(enumerate(FAMILY_TOKENS[decoder_block], RANKS)), decoder_block, vocab_size)


def special_tokens(added: Mapping[int, AddedToken], decoder_block: DecoderBlock, vocab_size: int) -> SpecialTokens:
    """Finds each part's token by its name.

    Args:
        added: all added tokens by id; they end the vocabulary.
        decoder_block: the model's family, which decides what stops and what pads.
        vocab_size: the model's vocabulary, rows without a token included.

    Raises:
        UserError: a token is missing, or the vocabulary ends below the last one.
    """
    ids = {token.content: id_ for id_, token in added.items()}
    count = max(ids.values(), default=-1) + 1
    if vocab_size < count:
        raise UserError(
            f"vocab_size {vocab_size} is smaller than the tokenizer's {count} tokens: it must hold them all"
        )
    end, text_end = _find(ids, "<|im_end|>"), _find(ids, "<|endoftext|>")
    pad, stop = (text_end, (end,)) if decoder_block == "qwen3_omni" else (end, (end, text_end))
    silent = {id_ for id_, token in added.items() if token.special and id_ not in stop}
    return SpecialTokens(
        audio_pad=_find(ids, "<|audio_pad|>"),
        audio_start=_find(ids, "<|audio_start|>"),
        audio_end=_find(ids, "<|audio_end|>"),
        im_start=_find(ids, "<|im_start|>"),
        im_end=end,
        pad=pad,
        stop=stop,
        never_sampled=_ranges(silent | set(range(count, vocab_size))),
    )


def _find(ids: Mapping[str, int], name: str) -> int:
    if name not in ids:
        raise UserError(f"The tokenizer has no token {name}: give one of Qwen3-Omni or Qwen3-ASR")
    return ids[name]


def _ranges(ids: set[int]) -> tuple[tuple[int, int], ...]:
    starts = sorted(id_ for id_ in ids if id_ - 1 not in ids)
    ends = sorted(id_ + 1 for id_ in ids if id_ + 1 not in ids)
    return tuple(zip(starts, ends, strict=True))
