"""Batches of prompts with audio, for training and for evaluation.

A batch of B prompts is a dictionary of

| entry | value |
|---|---|
| `<prompt column>` | [B, T] int32, filled up with the pad token; T is `max_prefill_predict_length` |
| `<prompt column>_true_length` | [B] int32, tokens of each prompt |
| `audios` | [B, M, F] float32 log-mel, zero beyond each clip; F is the same in all batches of a configuration |
| `audios_true_length` | [B] int32, frames of each clip |
| `audio_seconds` | [B] float32 |
| `samples` | list of B waveforms at 16 kHz, float32, each of its own length |
| `ground_truth_text`, `id` | lists of B strings |
| `language` | list of B strings or Nones |
| `valid` | [B] bool, in evaluation only: False for what fills the places of no usable record |

Several processes that share the reading of a batch each hold its own rows of `audios`, see `Share`; the rest is whole.
"""

import math
import os
from collections.abc import Callable

import grain
import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Int

from audio_grpo.audio import audio_token_count
from audio_grpo.config import Config
from audio_grpo.data.iterator import AudioDataIterator, Share
from audio_grpo.data.skipping import SkippingAccount
from audio_grpo.data.slots import EvaluationSlots, TrainingSlots
from audio_grpo.data.source import RecordSource
from audio_grpo.data.stages import (
    AudioToMelSpectrogram,
    Batch,
    BuildAudioGRPOPrompt,
    CollectGroundTruth,
    PadAudioGRPOToMaxLength,
    ParseAudioFeatures,
    RequireTranscriptFits,
    ResampleAudio,
)
from audio_grpo.errors import UserError
from audio_grpo.text import ReasoningTags, load_tokenizer

__all__ = ["AudioDataIterator", "Share", "create_audio_data_iterator", "evaluation_batches", "training_batches"]

_FRAMES_PER_SECOND = 100
_CHUNK = 100
"""Frames; the tower hears whole chunks, so less padding than this saves nothing."""
_MOST_THREADS = 16


def create_audio_data_iterator(
    config: Config, mesh: Mesh | None = None, share: Share | None = None
) -> AudioDataIterator:
    """Endless batches for training, shuffled anew in every epoch.

    A batch has the prompts of one optimizer step: `per_device_batch_size` × devices × `gradient_accumulation_steps`,
    where the devices are those of `mesh`, or all of them without one. Its records depend on data, seed and size alone;
    each of several processes reads all of them, or its share.

    Raises UserError where there is no data, the batch would not be a whole number of prompts, or, while iterating,
    where more than `max_skipped_fraction` of the records is unusable.
    """
    devices = jax.device_count() if mesh is None else mesh.size
    return training_batches(config, prompts_per_step(config, devices), share)


def prompts_per_step(config: Config, devices: int) -> int:
    """Prompts of one optimizer step. Raises UserError where they are no whole number ≥ 1."""
    prompts = config.per_device_batch_size * devices * config.gradient_accumulation_steps
    if round(prompts) < 1 or not math.isclose(prompts, round(prompts), rel_tol=1e-9):
        raise UserError(
            f"per_device_batch_size {config.per_device_batch_size} × {devices} devices × gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} is {prompts:g} prompts: make it a whole number of at least 1"
        )
    return round(prompts)


def training_batches(config: Config, batch_size: int, share: Share | None = None) -> AudioDataIterator:
    """Endless batches of `batch_size` prompts from `grain_train_files`, or a process's share of them.

    The place of an unusable record is taken by the one that comes there in the next epoch.

    Raises UserError as `create_audio_data_iterator` does.
    """
    if config.grain_train_files is None:
        raise UserError("grain_train_files is not set: name a folder of ArrayRecord files, one file, or a glob")
    source = RecordSource(config.grain_train_files)
    records = _prompts(config, grain.MapDataset.source(source).seed(config.seed).shuffle().repeat())
    if config.learns_transcripts:
        records = records.map(_requirement(config))
    slots = TrainingSlots(records, batch_size, _rows(batch_size, share), epoch=len(source))
    account = SkippingAccount(config.max_skipped_fraction, epoch=len(source))
    identity = {"records": len(source), "seed": config.seed, "batch_size": batch_size}
    return AudioDataIterator(_reader(config, slots, batch_size, share), account, identity, share)


def evaluation_batches(
    config: Config, path: epath.PathLike, batch_size: int, share: Share | None = None
) -> AudioDataIterator:
    """One pass in order over the records of `path`; the first `eval_max_clips` of them where that is not 0.

    `valid` is False for prompts that only take the place of unusable records or fill up the last batch.

    Raises UserError where there is no data, or, while iterating, where more than `max_skipped_fraction` of the
    records is unusable.
    """
    source = RecordSource(path)
    records = _prompts(config, grain.MapDataset.source(source)[: config.eval_max_clips or len(source)])
    slots = EvaluationSlots(records, batch_size, _rows(batch_size, share))
    account = SkippingAccount(config.max_skipped_fraction, epoch=len(records))
    identity = {"records": len(records), "batch_size": batch_size}
    return AudioDataIterator(_reader(config, slots, batch_size, share), account, identity, share)


def _prompts(config: Config, records: grain.MapDataset) -> grain.MapDataset:
    """Padded prompts and unusable records."""
    tokenizer = load_tokenizer(config.tokenizer_path)
    length, column = config.max_prefill_predict_length, config.prompt_column
    stages = [
        ParseAudioFeatures(config.audio_min_seconds, config.audio_max_seconds),
        ResampleAudio(),
        AudioToMelSpectrogram(config.num_mel_bins_for_audio),
        BuildAudioGRPOPrompt(
            tokenizer=tokenizer,
            template=config.template,
            instruction=config.instruction,
            tags=ReasoningTags.from_config(config),
            default_language=config.language,
            prompt_column=column,
            max_length=length,
        ),
        PadAudioGRPOToMaxLength(
            prompt_column=column,
            max_length=length,
            max_frames=padded_frames(config.audio_max_seconds, length),
            pad_token=tokenizer.special_tokens(config.decoder_block, config.vocab_size).pad,
        ),
    ]
    for stage in stages:
        records = records.map(stage)
    return records


def _requirement(config: Config) -> RequireTranscriptFits:
    """What a record must be to have its transcript learned whole."""
    tokenizer = load_tokenizer(config.tokenizer_path)
    return RequireTranscriptFits(
        tokenizer=tokenizer,
        template=config.template,
        tags=ReasoningTags.from_config(config),
        stop=tokenizer.special_tokens(config.decoder_block, config.vocab_size).stop[0],
        max_length=config.max_completion_length,
    )


def _reader(
    config: Config, slots: TrainingSlots | EvaluationSlots, batch_size: int, share: Share | None
) -> Callable[[int], grain.DatasetIterator]:
    """Starts reading at a batch; slots are made ahead in threads or worker processes, and come in order."""
    rows = len(_rows(batch_size, share))
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, rows))
    workers = grain.MultiprocessingOptions(config.grain_worker_count, per_worker_buffer_size=8)
    if config.grain_worker_count and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's processes read absl's flags, which only absl's own main parses

    def read(first: int) -> grain.DatasetIterator:
        following = grain.MapDataset.source(slots)[first * rows :].to_iter_dataset(ahead).mp_prefetch(workers)
        return iter(following.batch(rows, batch_fn=Batch()).map(CollectGroundTruth()))

    return read


def _rows(batch_size: int, share: Share | None) -> Int[np.ndarray, "n"]:
    return np.arange(batch_size) if share is None else share.rows


def padded_frames(max_seconds: float, max_prompt_tokens: int) -> int:
    """F: whole chunks that hold a clip of `max_seconds`, but no more than a prompt of that many tokens can hold."""
    by_seconds = math.ceil(max_seconds * _FRAMES_PER_SECOND / _CHUNK) * _CHUNK
    by_tokens = math.ceil(max_prompt_tokens / audio_token_count(_CHUNK)) * _CHUNK
    return min(by_seconds, by_tokens)
