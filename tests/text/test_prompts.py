"""Prompts have the published ids, and targets continue them."""

from typing import get_args

import pytest

from audio_grpo.config import Template, load_config
from audio_grpo.errors import UserError
from audio_grpo.text import ReasoningTags, Tokenizer, build_prompt, parse_answer, target_text

ARABIC = [151644, 872, 198, 151669, 151675, 151670, 3167, 3114, 279, 34117, 7699, 1119, 1467, 13, 151645, 198]
ASSISTANT = [151644, 77091, 198]
ASR = [151644, 8948, 198, 151645, 198, 151644, 872, 198, 151669, 151676, 151676, 151670, 151645, 198, *ASSISTANT]


def written(tokenizer: Tokenizer, tags: ReasoningTags, template: Template = "transcript", **changes: object) -> str:
    arguments: dict = {"audio_tokens": 1, "language": None, "instruction": None} | changes
    return tokenizer.decode(build_prompt(tokenizer, template, tags=tags, **arguments), skip_special_tokens=False)


def test_the_transcript_prompt_has_the_published_ids(omni: Tokenizer, tags: ReasoningTags) -> None:
    prompt = build_prompt(omni, "transcript", audio_tokens=1, language="Arabic", instruction=None, tags=tags)
    assert prompt == ARABIC + ASSISTANT


def test_the_asr_prompt_has_the_published_ids(asr: Tokenizer, tags: ReasoningTags) -> None:
    prompt = build_prompt(asr, "qwen3-asr", audio_tokens=2, language=None, instruction=None, tags=tags)
    assert prompt == ASR


def test_the_asr_prompt_forces_a_known_language(asr: Tokenizer, tags: ReasoningTags) -> None:
    prompt = build_prompt(asr, "qwen3-asr", audio_tokens=2, language="Arabic", instruction=None, tags=tags)
    assert prompt[: len(ASR)] == ASR
    assert asr.decode(prompt[len(ASR) :], skip_special_tokens=False) == "language Arabic<asr_text>"
    assert prompt[-1] == 151704


def test_context_goes_into_the_asr_system_turn(asr: Tokenizer, tags: ReasoningTags) -> None:
    text = written(asr, tags, "qwen3-asr", context="Nefertiti, Luxor")
    assert text.startswith("<|im_start|>system\nNefertiti, Luxor<|im_end|>\n<|im_start|>user\n<|audio_start|>")


def test_an_unknown_language_is_not_named(omni: Tokenizer, tags: ReasoningTags) -> None:
    assert "<|audio_end|>Transcribe the audio into text.<|im_end|>" in written(omni, tags)


def test_chinese_is_asked_for_in_chinese(omni: Tokenizer, tags: ReasoningTags) -> None:
    assert "<|audio_end|>请将这段中文语音转换为纯文本。<|im_end|>" in written(omni, tags, language="Chinese")


def test_the_reasoning_prompt_names_all_four_tags(omni: Tokenizer) -> None:
    tags = ReasoningTags(reasoning_start="[[", reasoning_end="]]", solution_start="{{", solution_end="}}")
    text = written(omni, tags, "reasoning", language="Dutch")
    assert "Transcribe the Dutch audio into text." in text
    assert "between [[ and ]]" in text
    assert "between {{ and }}" in text


def test_an_instruction_of_ones_own_replaces_the_templates(omni: Tokenizer, tags: ReasoningTags) -> None:
    text = written(omni, tags, "reasoning", language="Dutch", instruction="Write the {language}: {x}")
    assert text.endswith("<|audio_end|>Write the Dutch: {x}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", get_args(Template))
def test_a_prompt_has_one_placeholder_for_each_audio_token(
    tiny: Tokenizer, tags: ReasoningTags, template: Template
) -> None:
    prompt = build_prompt(tiny, template, audio_tokens=37, language=None, instruction=None, tags=tags)
    assert prompt.count(tiny.token_id("<|audio_pad|>")) == 37


def test_what_a_template_has_no_place_for_is_refused(asr: Tokenizer, tags: ReasoningTags) -> None:
    with pytest.raises(UserError, match="takes no instruction"):
        written(asr, tags, "qwen3-asr", instruction="Please")
    with pytest.raises(UserError, match="no system turn"):
        written(asr, tags, "transcript", context="names")
    with pytest.raises(UserError, match="needs a language"):
        written(asr, tags, "transcript", instruction="Write {language}")
    with pytest.raises(ValueError, match="at least one audio token"):
        written(asr, tags, "transcript", audio_tokens=0)


def test_an_omni_tokenizer_is_refused_for_the_asr_template(omni: Tokenizer, tags: ReasoningTags) -> None:
    with pytest.raises(UserError, match="<asr_text>"):
        written(omni, tags, "qwen3-asr")


@pytest.mark.parametrize("language", [None, "Arabic"])
@pytest.mark.parametrize("template", get_args(Template))
def test_the_target_is_parsed_back_to_the_transcript(
    tags: ReasoningTags, template: Template, language: str | None
) -> None:
    target = target_text(template, "seven blue lamps", language=language, tags=tags)
    answer = parse_answer(template, target, tags, language=language)
    assert (answer.text, answer.language) == ("seven blue lamps", language)


def test_targets_have_their_templates_form(tags: ReasoningTags) -> None:
    assert target_text("reasoning", "a", language=None, tags=tags) == "<reasoning></reasoning><answer>a</answer>"
    assert target_text("transcript", "a", language="Dutch", tags=tags) == "a"
    assert target_text("qwen3-asr", "a", language=None, tags=tags) == "language None<asr_text>a"
    assert target_text("qwen3-asr", "a", language="Dutch", tags=tags) == "a"


def test_tags_come_from_the_configuration(tags: ReasoningTags) -> None:
    assert ReasoningTags.from_config(load_config("base")) == tags
    assert ReasoningTags.from_config(load_config("base", ["solution_end_token=END"])).solution_end == "END"
