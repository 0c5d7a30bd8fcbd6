from collections.abc import Iterator
from pathlib import Path

import pytest

from audio_grpo.text import ReasoningTags, Tokenizer, load_tokenizer


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's caches."""
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        yield folder


@pytest.fixture(scope="session")
def omni() -> Tokenizer:
    return load_tokenizer("Qwen/Qwen3-Omni-30B-A3B-Instruct")


@pytest.fixture(scope="session")
def asr() -> Tokenizer:
    return load_tokenizer("Qwen/Qwen3-ASR-0.6B")


@pytest.fixture(scope="session")
def tiny() -> Tokenizer:
    return load_tokenizer("audio-grpo/tiny")


@pytest.fixture
def tags() -> ReasoningTags:
    return ReasoningTags(
        reasoning_start="<reasoning>",
        reasoning_end="</reasoning>",
        solution_start="<answer>",
        solution_end="</answer>",
    )
