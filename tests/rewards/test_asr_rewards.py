"""Built-in rewards are what the design says, to the number."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.config import Config
from audio_grpo.rewards import (
    asr_cer_reward,
    asr_format_reward,
    asr_wer_reward,
    compute_cer,
    compute_wer,
    extract_transcription,
)

PERFECT = "<reasoning>hm</reasoning><answer>seven blue lamps</answer>"


def wer_reward(completion: object, reference: str = "seven blue lamps", **keywords: object) -> float:
    (reward,) = asr_wer_reward(
        prompts=["p"],
        completions=[completion],
        ground_truth_text=[reference],
        **keywords,  # pyright: ignore
    )
    return reward


def format_reward(completion: str, **keywords: object) -> float:
    (reward,) = asr_format_reward(prompts=["p"], completions=[completion], **keywords)  # pyright: ignore
    return reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (PERFECT, 1.0 + 0.0 + 3.0),
        ("<answer>Seven, blue lamps!</answer>", 4.0),
        ("<answer>seven green lamps</answer>", 1.0 - 1 / 3),
        ("<answer>seven</answer>", 1.0 - 2 / 3),
        ("<answer></answer>", 1.0 - 1.0),
        ("<answer>a b c d e f g h i</answer>", 1.0 - 2.0),
        ("seven blue lamps", -2.0),
        ("<answer>seven blue lamps", -2.0),
        ("", -2.0),
    ],
)
def test_the_wer_reward_is_format_minus_capped_wer_plus_exact_match(completion: str, reward: float) -> None:
    assert wer_reward(completion) == pytest.approx(reward)


def test_the_cer_reward_counts_characters() -> None:
    completions = ["<answer>seven blue lamp</answer>", PERFECT, "none"]
    rewards = asr_cer_reward(prompts=["p"] * 3, completions=completions, ground_truth_text=["seven blue lamps"] * 3)
    assert rewards == pytest.approx([1.0 - 1 / 16, 4.0, -2.0])


@given(st.text("ab <>/", max_size=30), st.text("ab", min_size=1, max_size=10))
def test_rewards_follow_the_formula_for_any_answer(answer: str, reference: str) -> None:
    completion = f"<answer>{answer}</answer>"
    for function, rate_of in ((asr_wer_reward, compute_wer), (asr_cer_reward, compute_cer)):
        (reward,) = function(prompts=["p"], completions=[completion], ground_truth_text=[reference])
        extracted = extract_transcription(completion)
        assert extracted is not None
        rate = rate_of(reference, extracted, "basic")
        assert reward == pytest.approx(1.0 + max(-2.0, -rate) + (3.0 if rate == 0 else 0.0))


def test_an_empty_reference_wants_an_empty_answer() -> None:
    assert wer_reward("<answer></answer>", reference="") == 4.0
    assert wer_reward("<answer>one</answer>", reference="") == pytest.approx(0.0)
    assert wer_reward("<answer>one two three</answer>", reference="") == pytest.approx(-1.0)


@pytest.mark.parametrize("keyword", ["config", "tmvp_config"])
def test_amounts_and_tags_come_from_the_configuration(keyword: str) -> None:
    config = Config(
        asr_format_bonus=10.0,
        asr_reward_cap=0.5,
        asr_exact_match_bonus=100.0,
        asr_no_answer_penalty=-7.0,
        reward_exact_format_match=9.0,
        solution_start_token="[",
        solution_end_token="]",
        text_normalizer="none",
    )
    assert wer_reward("[seven blue lamps]", **{keyword: config}) == 110.0
    assert wer_reward("[Seven Blue Lamps]", **{keyword: config}) == 9.5
    assert wer_reward(PERFECT, **{keyword: config}) == -7.0
    assert format_reward("<reasoning></reasoning>[a]", **{keyword: config}) == 9.0


def test_a_maxtext_configuration_gives_the_keys_that_it_has() -> None:
    foreign = SimpleNamespace(asr_format_bonus=5, solution_start_token="<a>", solution_end_token="</a>", hardware="tpu")
    assert wer_reward("<a>seven blue lamps</a>", tmvp_config=foreign) == 8.0


def test_further_keywords_and_missing_prompts_are_accepted() -> None:
    assert asr_wer_reward(None, [PERFECT], ["seven blue lamps"], speaker=["x"], trainer_state=object()) == [4.0]
    assert asr_format_reward(None, [PERFECT], ground_truth_text=["x"]) == [3.0]


def test_conversations_are_scored_by_what_the_assistant_said() -> None:
    assert wer_reward([{"role": "assistant", "content": PERFECT}]) == 4.0


def test_a_bare_transcript_is_its_own_answer() -> None:
    config = Config(template="transcript")
    assert wer_reward("seven blue lamps", config=config) == 4.0
    assert wer_reward("", config=config) == 0.0
    assert wer_reward("<answer>seven blue lamps</answer>", config=config) < 4.0


def test_a_qwen3_asr_answer_follows_its_separator() -> None:
    config = Config(template="qwen3-asr")
    assert wer_reward("language English<asr_text>seven blue lamps", config=config) == 4.0
    assert wer_reward("language English", config=config) == -2.0
    forced = asr_wer_reward(
        ["assistant\nlanguage English<asr_text>"], ["seven blue lamps"], ["seven blue lamps"], config
    )
    assert forced == [4.0]


@pytest.mark.parametrize(
    ("completion", "matches"),
    [
        (PERFECT, True),
        ("<reasoning></reasoning> \n\t<answer></answer>", True),
        ("<reasoning>two\nlines</reasoning><answer>a\nb</answer>", True),
        (f" {PERFECT}", False),
        (f"{PERFECT}.", False),
        ("<reasoning>a</reasoning> so <answer>b</answer>", False),
        ("<answer>b</answer><reasoning>a</reasoning>", False),
        ("<answer>b</answer>", False),
        ("<reasoning>a</reasoning>", False),
        ("<reasoning>a</reasoning><answer>b</answer><answer>c</answer>", False),
        ("<reasoning>a<reasoning></reasoning><answer>b</answer>", False),
        ("<reasoning>a</reasoning><answer>b", False),
        ("", False),
    ],
)
def test_the_format_reward_wants_the_whole_completion_in_form(completion: str, matches: bool) -> None:
    assert format_reward(completion) == (3.0 if matches else 0.0)


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="1 entries of ground_truth_text for 2 completions"):
        asr_wer_reward(prompts=["p", "p"], completions=["a", "b"], ground_truth_text=["a"])
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        asr_format_reward(prompts=["p"], completions=["a", "b"])


def test_rewards_are_computed_without_loading_jax() -> None:
    code = (
        "import sys; from audio_grpo.rewards import compute_wer, asr_wer_reward, score_completions, resolve_reward; "
        "compute_wer('a', 'b', 'whisper-english'); asr_wer_reward(None, ['x'], ['x']); "
        "from audio_grpo.text import load_tokenizer; "
        "sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
