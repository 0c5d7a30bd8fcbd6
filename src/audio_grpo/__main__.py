"""`python -m audio_grpo`."""

from audio_grpo.cli import main

main()
