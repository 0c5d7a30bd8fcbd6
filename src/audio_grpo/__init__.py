"""GRPO post-training of speech models on word error rate."""
