"""The script that builds recorded speech, on packages that look unpacked already."""

import gzip
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from audio_grpo.data import decode_record
from audio_grpo.data.records import load_samples
from audio_grpo.data.source import RecordSource
from audio_grpo.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_recorded_speech.py"
SENTENCES = [f"this is sentence {n}" for n in range(20)]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build_recorded_speech", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _g722(seconds: float) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="g722") as output:
        stream = output.add_stream("g722", rate=16_000, layout="mono")
        samples = (8000 * np.sin(np.arange(round(seconds * 16_000)) / 10)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture
def cache(tmp_path):
    lines = ["; a comment: with a colon and words", "beep: [a tone of some kind]", "short: Two words"]
    lines += ["unrecorded: nobody has said this"]
    lines += [f"folder/{n}: {text}" for n, text in enumerate(SENTENCES)]
    texts = tmp_path / "asterisk-core-sounds-en/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    texts.parent.mkdir(parents=True)
    texts.write_bytes(gzip.compress("\n".join(lines).encode()))
    sounds = tmp_path / "asterisk-core-sounds-en-g722/usr/share/asterisk/sounds/en_XX"
    (sounds / "folder").mkdir(parents=True)
    for name in ("beep", "short", *(f"folder/{n}" for n in range(20))):
        (sounds / f"{name}.g722").write_bytes(_g722(0.3))
    return tmp_path


def test_sentences_with_recordings_are_split_the_same_way_every_time(script, cache):
    splits = []
    for name in ("a", "b"):
        script.build(cache / name, ["en"], cache)
        sources = {split: RecordSource(cache / name / split) for split in ("train", "test")}
        splits.append({split: [decode_record(s[i].content) for i in range(len(s))] for split, s in sources.items()})
    assert splits[0] == splits[1]
    train, test = ({record.text for record in splits[0][split]} for split in ("train", "test"))
    assert train | test == set(SENTENCES)
    assert not train & test
    record = splits[0]["train"][0]
    assert (record.language, record.id.split("/")[0]) == ("English", "en_XX")
    samples, rate = load_samples(record)
    assert (len(samples), rate) == (4800, 16_000)


def test_a_download_that_fails_says_what_to_do(script, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 100, stdout="", stderr="E: Can't find a source")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"apt-get update.*\n.*find a source"):
        script.unpack("asterisk-core-sounds-en", tmp_path / "cache")


def test_the_help_works():
    run = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "--cache" in run.stdout
