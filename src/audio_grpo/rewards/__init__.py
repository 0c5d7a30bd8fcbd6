"""What an answer is worth: error rates, the built-in rewards, and the user's own."""

from audio_grpo.rewards.asr import asr_cer_reward, asr_format_reward, asr_wer_reward
from audio_grpo.rewards.edits import EditCounts, character_edits, compute_cer, compute_wer, word_edits
from audio_grpo.rewards.overlong import soft_overlong_punishment_reward
from audio_grpo.rewards.quality import falls_into_loop, is_in_wrong_script
from audio_grpo.rewards.registry import RewardFunction, RewardTable, resolve_reward, score_completions
from audio_grpo.text import extract_transcription

__all__ = [
    "EditCounts",
    "RewardFunction",
    "RewardTable",
    "asr_cer_reward",
    "asr_format_reward",
    "asr_wer_reward",
    "character_edits",
    "compute_cer",
    "compute_wer",
    "extract_transcription",
    "falls_into_loop",
    "is_in_wrong_script",
    "resolve_reward",
    "score_completions",
    "soft_overlong_punishment_reward",
    "word_edits",
]
