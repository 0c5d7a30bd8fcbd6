"""Writing ArrayRecord data sets, whole or not at all."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from audio_grpo.data.records import encode_record
from audio_grpo.errors import UserError
from audio_grpo.types import AudioRecord

_OPTIONS = "group_size:1,uncompressed"
"""Random access reads single records, and encoded audio does not compress any further."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block is done, and vanishes when it fails.

    Raises UserError where `out` exists and is not an empty folder: nothing is overwritten.
    """
    if re.match(r"\w\w+:/", str(out)):
        raise UserError(f"{out} is remote: write to a local folder and copy it there")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: give a new one, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_records(records: Iterable[AudioRecord], folder: Path, *, shards: int = 1) -> int:
    """Deals the records out to `data-00000-of-00002.arrayrecord` and so on below `folder`; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"data-{shard:05d}-of-{shards:05d}.arrayrecord" for shard in range(shards)]
    writers = [ArrayRecordWriter(str(file), _OPTIONS) for file in files]
    count = 0
    try:
        for count, record in enumerate(records, start=1):
            writers[(count - 1) % shards].write(encode_record(record))
    finally:
        for writer in writers:
            writer.close()
    return count
