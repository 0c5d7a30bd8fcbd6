"""Writes tests/golden: tiny checkpoints of the reference and what it makes of some inputs, for tests without torch.

Run as `.parity/bin/python -m parity.make_goldens` from the project's root.
"""

from pathlib import Path

import numpy as np
from transformers import WhisperFeatureExtractor

from audio_grpo.config import DecoderBlock
from audio_grpo.model.spec import AudioTowerSpec, DecoderSpec, ThinkerSpec
from audio_grpo.types import AudioBatch
from parity.cases import Case
from parity.ours import padded, random_audio, random_prompts
from parity.reference import SPECIAL, build

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
FRAMES = (100, 57, 230)
GREEDY = 6


def _case(name: str, family: DecoderBlock, *, experts: int, tied: bool) -> Case:
    audio = AudioTowerSpec(width=16, layers=2, heads=2, ffn=24, channels=3, output=24, mel_bins=16, window_frames=200)
    decoder = DecoderSpec(
        layers=2,
        width=24,
        heads=4,
        kv_heads=2,
        head_width=8,
        mlp_width=32,
        experts=experts,
        experts_per_token=2,
        expert_width=12,
        norm_topk=True,
        vocab=96,
        tied=tied,
        rope_theta=1e6,
        norm_eps=1e-6,
    )
    return Case(name, family, ThinkerSpec(audio=audio, decoder=decoder, dtype="float32"), seed=0)


CASES = (
    _case("omni-experts", "qwen3_omni", experts=4, tied=False),
    _case("omni-dense", "qwen3_omni", experts=0, tied=False),
    _case("asr", "qwen3_asr", experts=0, tied=True),
)


def make_model(case: Case) -> None:
    """A checkpoint as the reference saves it, inputs, and its outputs in `expected.npz`."""
    reference = build(case)
    reference.model.save_pretrained(GOLDEN / case.name)
    (GOLDEN / case.name / "generation_config.json").unlink()
    rng = np.random.default_rng(0)
    features, frames = random_audio(rng, case.spec.audio.mel_bins, FRAMES)
    audio = AudioBatch(features.astype(np.float16).astype(np.float32), frames)
    prompts = random_prompts(rng, case.spec.decoder.vocab, FRAMES)
    first = AudioBatch(audio.features[:1, :, : FRAMES[0]], audio.frames[:1])
    greedy, _ = reference.generate(prompts[0], first, GREEDY)
    np.savez_compressed(
        GOLDEN / case.name / "expected.npz",
        features=audio.features.astype(np.float16),
        frames=audio.frames,
        tokens=padded(prompts).tokens,
        true_length=padded(prompts).true_length,
        audio_pad=SPECIAL.audio_pad,
        heard=np.concatenate(reference.hear(audio)),
        logits=np.stack([row[-1] for row in reference.logits(prompts, audio, "right")]),
        greedy=np.asarray(greedy),
    )


def make_log_mel() -> None:
    """Half a second of sound and its features."""
    rng = np.random.default_rng(0)
    time = np.arange(8000) / 16_000
    sound = 0.4 * np.sin(2 * np.pi * (200 + 3000 * time) * time) + 0.05 * rng.normal(size=8000)
    samples = (sound * 32767).astype(np.int16)
    extractor = WhisperFeatureExtractor(feature_size=128)
    features = extractor(
        samples / np.float32(32768), sampling_rate=16_000, truncation=False, padding=False, return_tensors="np"
    )
    np.savez_compressed(GOLDEN / "log_mel.npz", samples=samples, features=features.input_features[0])


if __name__ == "__main__":
    for one in CASES:
        make_model(one)
    make_log_mel()
