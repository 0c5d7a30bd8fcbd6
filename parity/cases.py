"""What is compared: random models of all kinds, and clip lengths around every boundary."""

import random
from dataclasses import dataclass

from audio_grpo.config import DecoderBlock
from audio_grpo.model.spec import AudioTowerSpec, DecoderSpec, ThinkerSpec


@dataclass(frozen=True)
class Case:
    """A model to build at random."""

    name: str
    family: DecoderBlock
    spec: ThinkerSpec
    seed: int
    """Of its weights and inputs."""


def _audio(rng: random.Random, output: int) -> AudioTowerSpec:
    heads = rng.choice([1, 2, 3, 4])
    return AudioTowerSpec(
        width=heads * rng.choice([8, 16, 24]),
        layers=rng.choice([1, 2, 3]),
        heads=heads,
        ffn=rng.choice([24, 64, 100]),
        channels=rng.choice([4, 6, 10]),
        output=output,
        mel_bins=rng.choice([128, 128, 128, 80]),
        window_frames=rng.choice([100, 200, 400, 800, 800, 800, 1600]),
    )


def _spec(rng: random.Random, *, experts: int, tied: bool) -> ThinkerSpec:
    kv_heads = rng.choice([1, 2, 4])
    width = rng.choice([32, 48, 64])
    return ThinkerSpec(
        audio=_audio(rng, width),
        decoder=DecoderSpec(
            layers=rng.choice([1, 2, 3]),
            width=width,
            heads=kv_heads * rng.choice([1, 2, 4]),
            kv_heads=kv_heads,
            head_width=rng.choice([8, 16, 32]),
            mlp_width=rng.choice([40, 64, 96]),
            experts=experts,
            experts_per_token=rng.randint(1, min(4, experts)) if experts else 1,
            expert_width=rng.choice([16, 24, 40]),
            norm_topk=rng.random() < 0.7,
            vocab=rng.choice([300, 512, 1000]),
            tied=tied,
            rope_theta=rng.choice([1e4, 1e6]),
            norm_eps=rng.choice([1e-6, 1e-5]),
        ),
        dtype="float32",
    )


def _cases() -> list[Case]:
    kinds: list[tuple[str, DecoderBlock, list[int], bool]] = [
        ("omni-experts", "qwen3_omni", [2, 3, 4, 6, 8, 16], False),
        ("omni-experts-tied", "qwen3_omni", [4, 8], True),
        ("omni-dense", "qwen3_omni", [0], False),
        ("asr-tied", "qwen3_asr", [0], True),
        ("asr-untied", "qwen3_asr", [0], False),
    ]
    counts = {"omni-experts": 12, "omni-experts-tied": 3, "omni-dense": 7, "asr-tied": 7, "asr-untied": 7}
    cases = []
    for kind, family, experts, tied in kinds:
        for number in range(counts[kind]):
            rng = random.Random(f"{kind} {number}")
            spec = _spec(rng, experts=experts[number % len(experts)], tied=tied)
            cases.append(Case(f"{kind}-{number}", family, spec, seed=len(cases)))
    return cases


CASES = _cases()

FRAMES = sorted(
    {
        *(50, 57, 63, 64, 65, 71, 72, 73, 80, 81, 93, 96, 97),
        *(
            100 * seconds + offset
            for seconds in (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 25)
            for offset in (-1, 0, 1)
        ),
        *(109, 117, 150, 188, 307, 640, 807, 808, 1000, 1234, 2499, 2500, 3000),
    }
)
"""Clip lengths. Convolutions see 100 frames, attention windows here are 100 to 1600."""


def batches(size: int) -> list[list[int]]:
    """All of `FRAMES` in mixed batches, each with a clip of a second or more.

    The reference pads chunks to the longest of its batch, and right only if that one is full.
    """
    shuffled = random.Random("batches").sample(FRAMES, len(FRAMES))
    whole = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
    return [batch if max(batch) >= 100 else [*batch, 100] for batch in whole]
