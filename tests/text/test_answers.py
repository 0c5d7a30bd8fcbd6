"""The answer is taken out of a completion in one place and by one rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.text import ReasoningTags, extract_transcription, forced_language, parse_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>seven lamps</answer>", "seven lamps"),
        ("<reasoning>hm</reasoning>\n<answer>\n seven lamps \n</answer>\n", "seven lamps"),
        ("<answer></answer>", ""),
        ("<answer>  </answer>", ""),
        ("seven lamps", None),
        ("", None),
        ("<answer>seven lamps", None),
        ("seven lamps</answer>", None),
        ("</answer>seven lamps<answer>", None),
        ("<answer>first</answer><answer>second</answer>", "second"),
        ("<answer>first</answer><answer>cut off", "first"),
        ("<reasoning>maybe <answer>no</answer></reasoning><answer>yes</answer>", "yes"),
        ("<answer>outer <answer>inner</answer></answer>", "inner"),
        ("<answer>a</answer>b</answer>", "a"),
        ("<answer>line\nbreak</answer>", "line\nbreak"),
        ("<answer>a < b > c</answer>", "a < b > c"),
    ],
)
def test_an_answer_is_the_last_closed_one(completion: str, answer: str | None) -> None:
    assert extract_transcription(completion) == answer


def test_tags_may_be_any_text() -> None:
    assert extract_transcription("(.*) what [x] (+)", "(.*)", "(+)") == "what [x]"


@given(st.text(st.sampled_from("ab<>/ \n")), st.text())
def test_any_text_without_tags_comes_back_stripped(inside: str, before: str) -> None:
    assert extract_transcription(f"{before}<answer>{inside}</answer>") == inside.strip()


def test_a_bare_transcript_is_all_that_is_written(tags: ReasoningTags) -> None:
    assert parse_answer("transcript", " <answer>x ", tags).text == "<answer>x"
    assert parse_answer("transcript", "", tags).text == ""


@pytest.mark.parametrize(
    ("completion", "text", "language"),
    [
        ("language English<asr_text>seven lamps", "seven lamps", "English"),
        ("language None<asr_text>", "", None),
        ("<asr_text> seven lamps", "seven lamps", None),
        ("language English", None, None),
        ("seven lamps", None, None),
        ("language Chinese,English<asr_text>a<asr_text>b", "a<asr_text>b", "Chinese,English"),
    ],
)
def test_an_asr_answer_names_its_language_first(
    tags: ReasoningTags, completion: str, text: str | None, language: str | None
) -> None:
    answer = parse_answer("qwen3-asr", completion, tags)
    assert (answer.text, answer.language) == (text, language)


def test_an_asr_answer_to_a_forced_language_is_all_that_is_written(tags: ReasoningTags) -> None:
    answer = parse_answer("qwen3-asr", "language is power", tags, language="English")
    assert (answer.text, answer.language) == ("language is power", "English")


def test_the_forced_language_is_read_from_the_end_of_a_prompt() -> None:
    assert forced_language("system\n\nuser\n\nassistant\nlanguage Arabic<asr_text>") == "Arabic"
    assert forced_language("language Arabic<asr_text>\nassistant\n") is None
    assert forced_language("user\nassistant\n") is None
