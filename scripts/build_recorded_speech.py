"""Builds a data set of recorded people from Debian's telephone prompts.

    python scripts/build_recorded_speech.py OUT --cache DIR [--language en es fr it ru]

The packages asterisk-core-sounds-LANGUAGE-g722 (CC-BY-SA-3.0; studio recordings, 16 kHz) and asterisk-core-sounds-
LANGUAGE (their transcripts) are downloaded with apt-get into DIR and unpacked there; nothing is installed and no root
is needed. Prompts of three words or more become OUT/train and OUT/test; the same sentence is never in both, and the
split is the same every time. Needs apt-get, dpkg-deb and the extra `video` (PyAV decodes G.722).
"""

import argparse
import gzip
import hashlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import soundfile

from audio_grpo.audio import decode_audio
from audio_grpo.data.inspect import inspect
from audio_grpo.data.write import new_folder, write_records
from audio_grpo.errors import UserError
from audio_grpo.types import AudioRecord

LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}
FEWEST_WORDS = 3
TEST_SHARE = 5
"""One sentence in this many is for `test`."""


def unpack(package: str, cache: Path) -> Path:
    """Downloads a Debian package into the cache, unless it is there, and returns the folder of its unpacked files."""
    folder = cache / package
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    download = subprocess.run(["apt-get", "download", package], cwd=cache, capture_output=True, text=True)
    if download.returncode != 0:
        raise UserError(
            f"apt-get could not download {package}; if the package lists are missing or old, run `apt-get update` "
            f"first:\n{download.stderr.strip()}"
        )
    (archive,) = cache.glob(f"{package}_*.deb")
    partial = cache / f"{package}.partial"
    subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
    return partial.rename(folder)


def transcripts(folder: Path, language: str) -> Iterator[tuple[str, str]]:
    """Names and texts of the lines `name: text`; sounds that are no speech have their description in brackets."""
    path = folder / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        name, separator, text = line.partition(":")
        if separator and not line.startswith(";") and "[" not in text and len(text.split()) >= FEWEST_WORDS:
            yield name.strip(), text.strip()


def recordings(language: str, cache: Path) -> Iterator[AudioRecord]:
    """All prompts of a language that have both a transcript and a recording, as flac."""
    package = f"asterisk-core-sounds-{language}"
    texts = unpack(package, cache)
    (sounds,) = (unpack(f"{package}-g722", cache) / "usr/share/asterisk/sounds").iterdir()
    for name, text in transcripts(texts, language):
        path = sounds / f"{name}.g722"
        if path.exists():
            samples, rate = decode_audio(path)
            file = io.BytesIO()
            soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
            yield AudioRecord(
                audio=file.getvalue(),
                text=text,
                sampling_rate=rate,
                language=LANGUAGES[language],
                id=f"{sounds.name}/{name}",
            )


def is_for_test(record: AudioRecord) -> bool:
    """Decided by the sentence alone, so that no sentence is learned and tested."""
    return hashlib.sha256(record.text.encode()).digest()[0] % TEST_SHARE == 0


def build(out: Path, languages: list[str], cache: Path) -> None:
    """Writes `train` and `test` below the new folder `out`."""
    records = [record for language in languages for record in recordings(language, cache)]
    with new_folder(out) as folder:
        write_records((record for record in records if not is_for_test(record)), folder / "train")
        write_records((record for record in records if is_for_test(record)), folder / "test")


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="folder for the packages; is kept")
    parser.add_argument("--language", nargs="+", choices=LANGUAGES, default=["en"])
    arguments = parser.parse_args()
    try:
        build(arguments.out, arguments.language, arguments.cache)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for split in ("train", "test"):
        summary = inspect(arguments.out / split)
        print(f"{split}: {summary.records} prompts, {summary.hours * 60:.1f} min, {summary.seconds_percentiles}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
