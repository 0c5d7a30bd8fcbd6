"""From files and bytes to log-mel features: decoding, resampling, log-mel, and how many tokens they become."""

from audio_grpo.audio.decode import decode_audio
from audio_grpo.audio.log_mel import log_mel
from audio_grpo.audio.resample import SAMPLING_RATE, resample
from audio_grpo.audio.tokens import audio_token_count

__all__ = ["SAMPLING_RATE", "audio_token_count", "decode_audio", "log_mel", "resample"]
