"""Each part in prompts and sampling is played by the token that the published models give it."""

import pytest

from audio_grpo.errors import UserError
from audio_grpo.text import Tokenizer, family_special_tokens
from audio_grpo.types import SpecialTokens


def may_be_sampled(special: SpecialTokens, id_: int) -> bool:
    return not any(start <= id_ < end for start, end in special.never_sampled)


def test_omni_stops_at_im_end_and_pads_with_endoftext() -> None:
    special = family_special_tokens("qwen3_omni", 152064)
    assert (special.stop, special.pad) == ((151645,), 151643)
    assert (special.audio_start, special.audio_end, special.audio_pad) == (151669, 151670, 151675)
    assert special.never_sampled == ((151643, 151645), (151646, 151657), (151669, 152064))


def test_asr_stops_at_im_end_and_endoftext_and_pads_with_im_end() -> None:
    special = family_special_tokens("qwen3_asr", 151936)
    assert (special.stop, special.pad, special.audio_pad) == ((151645, 151643), 151645, 151676)
    assert may_be_sampled(special, 151643)
    assert may_be_sampled(special, 151704)
    assert not may_be_sampled(special, 151644)
    assert not any(may_be_sampled(special, id_) for id_ in (151676, 151677, 151703, 151705, 151935))


def test_text_thoughts_tools_and_stops_may_be_sampled() -> None:
    special = family_special_tokens("qwen3_omni", 152064)
    allowed = {id_ for id_ in range(152064) if may_be_sampled(special, id_)}
    assert allowed == {*range(151643), 151645, *range(151657, 151669)}


def test_ranges_are_sorted_and_do_not_touch() -> None:
    for start_end, following in zip(
        ranges := family_special_tokens("qwen3_asr", 151936).never_sampled, ranges[1:], strict=False
    ):
        assert start_end[0] < start_end[1] < following[0]


def test_the_constants_are_the_tokenizers_own(omni: Tokenizer, asr: Tokenizer) -> None:
    assert omni.special_tokens("qwen3_omni", 152064) == family_special_tokens("qwen3_omni", 152064)
    assert asr.special_tokens("qwen3_asr", 151936) == family_special_tokens("qwen3_asr", 151936)


def test_the_tiny_tokenizer_plays_the_same_parts_for_both_families(tiny: Tokenizer) -> None:
    special = tiny.special_tokens("qwen3_omni", 1024)
    names = (special.audio_pad, special.im_start, special.im_end, special.pad, *special.stop)
    tokens = [tiny.backend.id_to_token(id_) for id_ in names]
    assert tokens == ["<|audio_pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>"]
    assert not may_be_sampled(special, special.audio_pad)
    assert may_be_sampled(special, special.im_end)
    assert tiny.special_tokens("qwen3_asr", 1024).pad == special.im_end


def test_rows_beyond_the_tokenizer_are_never_sampled(tiny: Tokenizer) -> None:
    special = tiny.special_tokens("qwen3_omni", 1100)
    assert not any(may_be_sampled(special, id_) for id_ in range(1024, 1100))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(UserError, match="vocab_size 1000 is smaller than the tokenizer's 1024 tokens"):
        tiny.special_tokens("qwen3_omni", 1000)
    with pytest.raises(UserError, match="151676"):
        family_special_tokens("qwen3_omni", 151675)


def test_a_tokenizer_of_another_family_is_refused() -> None:
    import tokenizers

    other = Tokenizer("other", tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])))
    with pytest.raises(UserError, match=r"no token <\|im_end\|>"):
        other.special_tokens("qwen3_omni", 10)
