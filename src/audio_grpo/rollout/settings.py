"""Sizes of the engine: what its user sets, and what follows for one workload."""

from dataclasses import dataclass, replace

from audio_grpo.config import Config
from audio_grpo.rollout.sampler import Sampling

_PREFILL_PROMPTS = 8
"""Prompts run in one prefill at most."""
_FEWEST_SLOTS = 8
"""Of a part; fewer cost a decode step as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Sizes that fix the engine's compiled programs."""

    prompt_length: int
    """T: tokens of the longest prompt."""
    completion_length: int
    """C: tokens of the longest completion."""
    generations: int
    """G: completions of each prompt."""
    max_slots: int
    """Completions that decode together at most."""
    burst: int
    """Tokens decoded in one dispatch."""
    sampling: Sampling
    seed: int
    stop_strings: tuple[str, ...] = ()
    """Any of these ends a completion, with the token that completes it."""
    router_replay: bool = False
    """Results tell which experts each token went to."""


def engine_settings(config: Config) -> EngineSettings:
    """Settings of a training run's rollouts."""
    return EngineSettings(
        prompt_length=config.max_prefill_predict_length,
        completion_length=config.max_completion_length,
        generations=config.num_generations,
        max_slots=config.max_slots,
        burst=config.decode_burst,
        sampling=Sampling(
            greedy=config.decode_sampling_strategy == "greedy",
            temperature=config.decode_sampling_temperature,
            top_k=config.decode_sampling_top_k,
            top_p=config.decode_sampling_nucleus_p,
            min_p=config.decode_sampling_min_p,
            repetition_penalty=config.repetition_penalty,
            min_length=config.min_completion_length,
        ),
        seed=config.seed,
        stop_strings=tuple(config.stop_strings),
        router_replay=config.router_replay,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadShape:
    """Slots and rows for one workload; they and prefills come in `parts`, one for each device that holds some."""

    parts: int
    slots: int
    rows: int
    """Of the prompt cache."""
    generations: int
    """G: completions of each prompt."""
    prefill: int
    """Prompts in one prefill."""

    @property
    def slots_of_part(self) -> int:
        """Slots on one device, or on those that share some."""
        return self.slots // self.parts

    @property
    def narrow_at(self) -> int:
        """Slots of each part that are kept once no more are needed; 0 where they would be too few."""
        half = self.slots_of_part // 2
        return half if half >= _FEWEST_SLOTS else 0

    def narrowed(self, needed: int) -> "WorkloadShape":
        """The same with half the slots, and half again, as long as `needed` of each part remain."""
        if not self.narrow_at or needed > self.narrow_at:
            return self
        return replace(self, slots=self.narrow_at * self.parts).narrowed(needed)


def workload_shape(settings: EngineSettings, parts: int, prompts: int, generations: int) -> WorkloadShape:
    """Slots for the whole workload if they fit; rows for four times the prompts that fill the slots, for stragglers.

    All are counted for each part first: its prompts, its share of `max_slots`.
    """
    prompts = -(-prompts // parts)
    slots = min(-(-settings.max_slots // parts), prompts * generations)
    filling = -(-slots // generations)
    return WorkloadShape(
        parts=parts,
        slots=slots * parts,
        rows=min(prompts, 4 * filling) * parts,
        generations=generations,
        prefill=min(filling, -(-_PREFILL_PROMPTS // parts)) * parts,
    )
