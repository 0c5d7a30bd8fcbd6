"""What travels between the rooms: every field with its shape, its unit and an example.

Shape letters, here and everywhere: B prompts, G completions per prompt, T prompt tokens, C completion tokens, F mel
frames, M mel bins, A audio tokens, D model width, H heads, K key/value heads, N head width, E experts, V vocabulary,
S decode slots, L layers. Host carriers are dataclasses over numpy; what crosses into compiled programs is a NamedTuple,
which JAX takes as it is. Nothing here imports JAX.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioRecord:
    """One clip and its transcript, as an ArrayRecord data set holds it."""

    audio: bytes | Float32[np.ndarray, "samples"]
    """An encoded file (wav, flac, ogg, mp3) or mono samples in −1..1."""
    text: str
    """The reference transcript, e.g. "seven blue lamps"."""
    sampling_rate: int | None = None
    """Hz; required for samples, None for an encoded file that states its own."""
    language: str | None = None
    """English name of the spoken language, e.g. "Arabic"."""
    id: str | None = None
    """Name that survives packing, e.g. "speaker3/utt_00017"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Token ids that prompts, the engine and the model need by role."""

    audio_pad: int
    """Placeholder that one audio token's embedding replaces, e.g. 151675."""
    audio_start: int
    audio_end: int
    im_start: int
    im_end: int
    pad: int
    """Fills rows beyond their true length, e.g. 151643."""
    stop: tuple[int, ...]
    """Any of these ends a completion and is its last token, e.g. (151645,)."""
    never_sampled: tuple[tuple[int, int], ...]
    """Half-open id ranges of media, padding and unused ids, e.g. ((151646, 151657), (151676, 152064))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputData:
    """One prompt for the engine, heard once and answered `num_generations` times."""

    id: str
    """Names the request in results, metrics and error messages."""
    tokens: Int32[np.ndarray, "T"]
    """Prompt token ids, audio placeholders already expanded; entries beyond `true_length` are ignored."""
    true_length: int
    """Number of prompt tokens, e.g. 59."""
    audio_features: Float32[np.ndarray, "M F"] | None = None
    """Log-mel features; None for a prompt without audio."""
    audio_mask: Bool[np.ndarray, "F"] | None = None
    """True for real frames, which come first; None means that all F frames are real."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer."""

    token_ids: Int32[np.ndarray, "C"]
    """Without padding, the stop token included."""
    logprobs: Float32[np.ndarray, "C"]
    """Natural logarithm of each token's probability under the tempered full distribution."""
    log_kept: Float32[np.ndarray, "C"]
    """Log of the share of that distribution that could be drawn (allowed tokens, top-k, top-p, min-p): `logprobs` less
    this is the log-probability of the draw itself."""
    finish_reason: FinishReason
    """"stop": a stop token came; "length": the budget of tokens was used up first."""
    routes: Int[np.ndarray, "C Lk"] | None = None
    """Experts that each token went to, as `Routes` has them, where the engine keeps them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """All completions of one request, in sample order."""

    id: str
    completions: tuple[Completion, ...]
    """Empty where the request failed."""
    error: str | None = None
    """Why it failed."""
    prompt_routes: Int[np.ndarray, "T Lk"] | None = None
    """Those of the prompt's tokens."""


class AudioBatch(NamedTuple):
    """Log-mel features of B clips."""

    features: Float[Any, "B M F"]
    """Zero beyond a clip's frames."""
    frames: Int32[Any, "B"]
    """Real frames of each clip, 100 a second; 0 for a prompt without audio."""


class PromptBatch(NamedTuple):
    """B prompts, padded on the right to T tokens."""

    tokens: Int32[Any, "B T"]
    true_length: Int32[Any, "B"]


class Routes(NamedTuple):
    """Experts that the tokens of B prompts and of G completions of each went to while these were sampled.

    Every token has the numbers of k experts for each of L layers, those of the first layer first: [3, 17, 9, 60] where
    it went to 3 and 17 in the first of two layers. −1 stands for what is not known. Integers are the narrowest that
    hold these numbers.
    """

    prompts: Int[Any, "B T Lk"]
    completions: Int[Any, "B G C Lk"]
    """A batch may have more completions than these, which come last and were not sampled."""


class GroupBatch(NamedTuple):
    """B prompts with G completions each: what the learner learns from.

    A completion's real tokens come first; `mask` tells them from padding:

        completion_tokens  [[ 8948, 11, 151645, 151643 ], ...]
        mask               [[ True, True, True, False ], ...]
    """

    prompts: PromptBatch
    completion_tokens: Int32[Any, "B G C"]
    mask: Bool[Any, "B G C"]
    """True for tokens that count in the loss, the stop token included."""
    advantages: Float32[Any, "B G"]
    token_weights: Float32[Any, "B G C"]
    """Weight of each token in the loss, normalised over the *whole* accumulated batch; sums to about 1."""
    old_log_probs: Float32[Any, "B G C"] | None = None
    """Fixed log-probabilities of the policy that the batch's iterations depart from; None in the first iteration."""
    reference_log_probs: Float32[Any, "B G C"] | None = None
    """Of the frozen reference; None where beta is 0."""
    sampler_log_probs: Float32[Any, "B G C"] | None = None
    """What the engine reported while sampling; of no meaning where a transcript is."""
    entropy_weights: Float32[Any, "B G C"] | None = None
    """Weight of each token in the mean entropy, normalised likewise; None where there is no entropy bonus."""
    transcript_weights: Float32[Any, "B G C"] | None = None
    """Weight of each token in the mean cross-entropy of the clips' transcripts, normalised likewise: 0 but for a
    transcript's tokens, the last of each group's G. None where groups have sampled completions alone."""
    routes: Routes | None = None
    """Experts that the learner's forward replays; None where its own router chooses."""

    @property
    def sampled(self) -> Bool[Any, "B G C"]:
        """True for those of the tokens that count which the policy has drawn."""
        return self.mask if self.transcript_weights is None else self.mask & (self.transcript_weights == 0)


@dataclass(slots=True, kw_only=True)
class SkippedRecords:
    """Records that the data pipeline left out, and why."""

    seen: int = 0
    """Records looked at."""
    reasons: dict[str, list[str]] = field(default_factory=dict)
    """Reason to record names, e.g. {"longer than audio_max_seconds": ["talk_3"]}."""


Columns = Mapping[str, Any]
