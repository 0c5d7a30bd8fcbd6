"""Built-in rewards: word or character errors of the answer, and the form of the whole completion.

They are called as TRL and MaxText call theirs, by keyword and with more keywords than they use.
"""

import re
from collections.abc import Callable, Sequence

from audio_grpo.config import Config
from audio_grpo.rewards.edits import EditCounts, character_edits, word_edits
from audio_grpo.text import ReasoningTags, forced_language, get_normalizer, parse_answer

Completion = str | list[dict[str, str]]
"""Plain text, or a conversation [{"role": "assistant", "content": text}]."""

Prompts = Sequence[object] | None
"""Only decoded text is looked at."""

_KEYS = (
    *("asr_format_bonus", "asr_reward_cap", "asr_exact_match_bonus", "asr_no_answer_penalty"),
    *("reward_exact_format_match", "template", "text_normalizer"),
    *("reasoning_start_token", "reasoning_end_token", "solution_start_token", "solution_end_token"),
)


def asr_wer_reward(
    prompts: Prompts,
    completions: Sequence[Completion],
    ground_truth_text: Sequence[str],
    config: object = None,
    tmvp_config: object = None,
    **_: object,
) -> list[float]:
    """`asr_format_bonus` + max(−`asr_reward_cap`, −WER) + (`asr_exact_match_bonus` if WER = 0) for each completion.

    Without an answer it is `asr_no_answer_penalty`.

    Args:
        prompts: one for each completion; only template "qwen3-asr" looks at them, for the language that they force.
        completions: what the model wrote, without special tokens.
        ground_truth_text: the reference of each completion.
        config: amounts, tags, template and normaliser; None takes the defaults. Another configuration object, such as
            MaxText's, needs only those of the keys that it wants to change.
        tmvp_config: MaxText's name for `config`.

    Raises:
        ValueError: the columns differ in length.
    """
    return _error_rewards(prompts, completions, ground_truth_text, _settings(config, tmvp_config), word_edits)


def asr_cer_reward(
    prompts: Prompts,
    completions: Sequence[Completion],
    ground_truth_text: Sequence[str],
    config: object = None,
    tmvp_config: object = None,
    **_: object,
) -> list[float]:
    """`asr_wer_reward` with the character error rate."""
    return _error_rewards(prompts, completions, ground_truth_text, _settings(config, tmvp_config), character_edits)


def asr_format_reward(
    prompts: Prompts,
    completions: Sequence[Completion],
    config: object = None,
    tmvp_config: object = None,
    **_: object,
) -> list[float]:
    """`reward_exact_format_match` where the whole completion is reasoning and answer in their tags, else 0.

    White space may stand between the two and nothing else anywhere; each tag occurs once.
    """
    settings = _settings(config, tmvp_config)
    form = _exact_form(ReasoningTags.from_config(settings))
    matches = [form.fullmatch(completion) is not None for _, completion in _texts(prompts, completions)]
    return [settings.reward_exact_format_match if match else 0.0 for match in matches]


def _settings(config: object, tmvp_config: object) -> Config:
    given = tmvp_config if config is None else config
    if given is None:
        return Config()
    if isinstance(given, Config):
        return given
    # MaxText's configuration cannot know keys that only we have; those that it has are checked like our own.
    return Config(**{key: getattr(given, key) for key in _KEYS if hasattr(given, key)})


def _error_rewards(
    prompts: Prompts,
    completions: Sequence[Completion],
    references: Sequence[str],
    settings: Config,
    count: Callable[[str, str], EditCounts],
) -> list[float]:
    if len(references) != len(completions):
        raise ValueError(f"There are {len(references)} entries of ground_truth_text for {len(completions)} completions")
    rule = get_normalizer(settings.text_normalizer)
    tags = ReasoningTags.from_config(settings)
    rewards: list[float] = []
    for (prompt, completion), reference in zip(_texts(prompts, completions), references, strict=True):
        answer = parse_answer(settings.template, completion, tags, language=forced_language(prompt)).text
        rate = None if answer is None else count(rule(reference), rule(answer)).rate
        rewards.append(_amount(rate, settings))
    return rewards


def _amount(rate: float | None, settings: Config) -> float:
    if rate is None:
        return settings.asr_no_answer_penalty
    exact = settings.asr_exact_match_bonus if rate == 0 else 0.0
    return settings.asr_format_bonus + max(-settings.asr_reward_cap, -rate) + exact


def _texts(prompts: Prompts, completions: Sequence[Completion]) -> list[tuple[str, str]]:
    prompts = [""] * len(completions) if prompts is None else prompts
    if len(prompts) != len(completions):
        raise ValueError(f"There are {len(prompts)} prompts for {len(completions)} completions: give one for each")
    pairs = zip(prompts, completions, strict=True)
    return [(prompt if isinstance(prompt, str) else "", _text(completion)) for prompt, completion in pairs]


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _exact_form(tags: ReasoningTags) -> re.Pattern[str]:
    reasoning = re.escape(tags.reasoning_start), re.escape(tags.reasoning_end)
    solution = re.escape(tags.solution_start), re.escape(tags.solution_end)
    inside = f"(?:(?!{'|'.join(reasoning + solution)}).)*"
    return re.compile(rf"{reasoning[0]}{inside}{reasoning[1]}\s*{solution[0]}{inside}{solution[1]}", re.DOTALL)
