"""GRPO post-training of speech models on word error rate."""

from audio_grpo.host_devices import room_to_wait

room_to_wait()
