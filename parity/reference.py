"""The published implementation, as the transformers package carries it, with every weight random."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    Qwen3ASRConfig,
    Qwen3ASRForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from audio_grpo.audio import audio_token_count
from audio_grpo.model.spec import AudioTowerSpec, DecoderSpec
from audio_grpo.types import AudioBatch, SpecialTokens
from parity.cases import Case

SPECIAL = SpecialTokens(
    audio_pad=5, audio_start=3, audio_end=4, im_start=1, im_end=2, pad=0, stop=(2,), never_sampled=()
)

_SMALLEST_VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 1,
    "patch_size": 2,
    "temporal_patch_size": 1,
    "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0],
}


@dataclass
class Reference:
    """A random model and the calls that the comparison needs."""

    model: Any
    asr: bool
    routed: list[np.ndarray] = field(default_factory=list)
    """Chosen experts [tokens, k] of each layer in the calls since it was last cleared."""
    router_probabilities: list[np.ndarray] = field(default_factory=list)

    def hear(self, audio: AudioBatch) -> list[np.ndarray]:
        """Embeddings of each clip, [A', D]."""
        features, mask = self._audio(audio)
        with torch.no_grad():
            heard = self.model.model.get_audio_features(features, mask)
        rows = heard.pooler_output.numpy()
        counts = audio_token_count(np.asarray(audio.frames))
        return np.split(rows, np.cumsum(counts)[:-1])

    def logits(
        self, sequences: list[list[int]], audio: AudioBatch, padding: Literal["left", "right"]
    ) -> list[np.ndarray]:
        """Logits at each token of each sequence, [T', V]."""
        ids, mask = _pad(sequences, padding)
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=mask, **self._audio_inputs(audio)).logits.numpy()
        return [row[real] for row, real in zip(logits, mask.numpy().astype(bool), strict=True)]

    def generate(self, prompt: list[int], audio: AudioBatch, tokens: int) -> tuple[list[int], np.ndarray]:
        """Greedy tokens after one prompt, and the logits [C, V] that they were taken from."""
        output = self.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            **self._audio_inputs(audio),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=list(SPECIAL.stop),
            pad_token_id=SPECIAL.pad,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).numpy()

    def _audio_inputs(self, audio: AudioBatch) -> dict[str, torch.Tensor]:
        features, mask = self._audio(audio)
        return {"input_features": features, "input_features_mask" if self.asr else "feature_attention_mask": mask}

    def _audio(self, audio: AudioBatch) -> tuple[torch.Tensor, torch.Tensor]:
        frames = audio.features.shape[2]
        padding = -frames % 100 if self.asr else 0
        features = np.pad(np.asarray(audio.features), ((0, 0), (0, 0), (0, padding)))
        mask = np.arange(frames + padding) < np.asarray(audio.frames)[:, None]
        return torch.tensor(features), torch.tensor(mask.astype(np.int64))


def build(case: Case) -> Reference:
    """A reference model of the case's sizes, every weight random."""
    torch.manual_seed(case.seed)
    asr = case.family == "qwen3_asr"
    if asr:
        model = Qwen3ASRForConditionalGeneration(_asr_config(case))
    else:
        model = Qwen3OmniMoeThinkerForConditionalGeneration(_omni_config(case))
    randomize(model)
    reference = Reference(model.eval(), asr)
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _, __, out: _record(reference, *out))
    return reference


def _record(reference: Reference, logits: torch.Tensor, _: torch.Tensor, chosen: torch.Tensor) -> None:
    reference.routed.append(chosen.numpy())
    reference.router_probabilities.append(logits.softmax(-1).numpy())


def randomize(model: torch.nn.Module) -> None:
    """Draw every weight so that all of the network speaks: the default start leaves much of it silent."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.ndim == 1:
                weight.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise)
            elif name.endswith("embed_tokens.weight"):
                weight.copy_(noise * 2 * weight.shape[1] ** -0.5)
            elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                weight.copy_(noise * weight.shape[2] ** -0.5)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)


def _pad(sequences: list[list[int]], side: Literal["left", "right"]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, sequences))
    ids, mask = np.full((len(sequences), longest), SPECIAL.pad), np.zeros((len(sequences), longest), np.int64)
    for i, tokens in enumerate(sequences):
        place = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[i, place], mask[i, place] = tokens, 1
    return torch.tensor(ids), torch.tensor(mask)


def _text_config(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_width,
        "intermediate_size": spec.mlp_width,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": 65536,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
    }


def _audio_config(spec: AudioTowerSpec) -> dict[str, Any]:
    return {
        "d_model": spec.width,
        "encoder_layers": spec.layers,
        "encoder_attention_heads": spec.heads,
        "encoder_ffn_dim": spec.ffn,
        "downsample_hidden_size": spec.channels,
        "output_dim": spec.output,
        "num_mel_bins": spec.mel_bins,
        "n_window": spec.chunk_frames // 2,
        "n_window_infer": spec.window_frames,
    }


def _omni_config(case: Case) -> Qwen3OmniMoeThinkerConfig:
    spec = case.spec.decoder
    half = spec.head_width // 2
    text = _text_config(spec)
    text["rope_parameters"] |= {
        "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        "mrope_interleaved": True,
    }
    text |= {
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.experts_per_token,
        "moe_intermediate_size": spec.expert_width,
        "norm_topk_prob": spec.norm_topk,
        "mlp_only_layers": [],
    }
    config = Qwen3OmniMoeThinkerConfig(
        text_config=text,
        audio_config=_audio_config(case.spec.audio),
        vision_config=_SMALLEST_VISION | {"out_hidden_size": spec.width},
        audio_token_id=SPECIAL.audio_pad,
        audio_start_token_id=SPECIAL.audio_start,
        image_token_id=6,
        video_token_id=7,
        tie_word_embeddings=spec.tied,
    )
    config.vision_start_token_id = 8
    return config


def _asr_config(case: Case) -> Qwen3ASRConfig:
    spec = case.spec
    return Qwen3ASRConfig(
        text_config={"model_type": "qwen3"} | _text_config(spec.decoder),
        audio_config={"model_type": "qwen3_asr_encoder"} | _audio_config(spec.audio),
        audio_token_id=SPECIAL.audio_pad,
        pad_token_id=SPECIAL.pad,
        eos_token_id=list(SPECIAL.stop),
        tie_word_embeddings=spec.decoder.tied,
    )
