"""Record schema, packing, inspection and synthesis of data, and the Grain pipeline.

Grain imports JAX, so the pipeline's names are loaded when they are first asked for; the rest starts at once.
"""

from typing import TYPE_CHECKING, Any

from audio_grpo.data.inspect import DataSummary, inspect
from audio_grpo.data.pack import pack
from audio_grpo.data.records import decode_record, encode_record
from audio_grpo.data.synthesize import synthesize

if TYPE_CHECKING:
    from audio_grpo.data.pipeline import AudioDataIterator, Share, create_audio_data_iterator, evaluation_batches

__all__ = [
    "AudioDataIterator",
    "DataSummary",
    "Share",
    "create_audio_data_iterator",
    "decode_record",
    "encode_record",
    "evaluation_batches",
    "inspect",
    "pack",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from audio_grpo.data import pipeline

    return getattr(pipeline, name)
