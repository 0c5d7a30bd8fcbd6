import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from clips import flac

from audio_grpo.data import decode_record, pack
from audio_grpo.data.source import RecordSource
from audio_grpo.errors import UserError
from audio_grpo.types import AudioRecord

CLIPS = {"a/one.flac": ("one", 0.1), "a/two.flac": ("two, three", 0.2), "b/four.flac": ("four", 0.3)}


@pytest.fixture
def folder(tmp_path):
    """Audio files with their transcripts beside them."""
    for name, (text, seconds) in CLIPS.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(flac(seconds))
        path.with_suffix(".txt").write_text(text + "\n")
    return tmp_path / "source"


def _rows() -> list[dict]:
    return [{"audio": name, "text": text} for name, (text, _) in CLIPS.items()]


def _jsonl(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def _csv(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.csv"
    path.write_text("audio,text\n" + "".join(f'{row["audio"]},"{row["text"]}"\n' for row in rows))
    return path


def _tsv(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.tsv"
    path.write_text("text\taudio\n" + "".join(f"{row['text']}\t{row['audio']}\n" for row in rows))
    return path


def _parquet(folder: Path, rows: list[dict]) -> Path:
    for row in rows:
        row["audio"] = {"bytes": (folder / row["audio"]).read_bytes(), "path": row["audio"]}
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _read(out: Path) -> list[AudioRecord]:
    source = RecordSource(out)
    return [decode_record(source[i].content) for i in range(len(source))]


@pytest.mark.parametrize("write", [_jsonl, _csv, _tsv, _parquet])
def test_every_kind_of_manifest_packs_to_the_same_records(folder, tmp_path, write):
    assert pack(write(folder, _rows()), tmp_path / "out") == 3
    expected = [
        AudioRecord(audio=flac(seconds), text=text, id=name.removesuffix(".flac"))
        for name, (text, seconds) in CLIPS.items()
    ]
    assert _read(tmp_path / "out") == expected


def test_a_folder_of_audio_takes_transcripts_from_the_txt_beside(folder, tmp_path):
    assert pack(folder, tmp_path / "out") == 3
    assert [(r.id, r.text) for r in _read(tmp_path / "out")] == [
        (name.removesuffix(".flac"), text) for name, (text, _) in CLIPS.items()
    ]


def test_a_folder_of_parquet_files_is_read_file_by_file(folder, tmp_path):
    (tmp_path / "tables").mkdir()
    for number, row in enumerate(_rows()):
        _parquet(folder, [row]).rename(tmp_path / "tables" / f"{number}.parquet")
    assert pack(tmp_path / "tables", tmp_path / "out") == 3


def test_all_columns_arrive(folder, tmp_path):
    row = {"audio": "b/four.flac", "text": "vier", "sampling_rate": 16_000, "language": "German", "id": "x/4"}
    pack(_jsonl(folder, [row]), tmp_path / "out")
    assert _read(tmp_path / "out") == [AudioRecord(**row | {"audio": flac(0.3)})]


def test_empty_cells_are_as_if_the_column_were_missing(folder, tmp_path):
    (folder / "m.csv").write_text("audio,text,sampling_rate,language,id\na/one.flac,one,,,\n")
    pack(folder / "m.csv", tmp_path / "out")
    assert _read(tmp_path / "out") == [AudioRecord(audio=flac(0.1), text="one", id="a/one")]


def test_shards_are_numbered_and_dealt_out_in_turn(folder, tmp_path):
    pack(folder, tmp_path / "out", shards=2)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "data-00000-of-00002.arrayrecord",
        "data-00001-of-00002.arrayrecord",
    ]
    assert [record.text for record in _read(tmp_path / "out")] == ["one", "four", "two, three"]


def test_everything_wrong_is_listed_at_once_and_nothing_is_left_behind(folder, tmp_path):
    (folder / "noise.wav").write_bytes(b"noise")
    rows = [
        {"audio": "a/one.flac", "text": "fine"},
        {"audio": "a/missing.flac", "text": "x"},
        {"audio": "a/two.flac", "text": " "},
        {"audio": "a/two.flac", "text": "x", "id": "a/one"},
        {"audio": "noise.wav", "text": "x"},
        {"text": "x", "languag": "German"},
        {"audio": 3, "text": 4},
        {"audio": "b/four.flac", "text": "x", "sampling_rate": -1},
    ]
    with pytest.raises(UserError) as error:
        pack(_jsonl(folder, rows), tmp_path / "out")
    message = str(error.value)
    for complaint in (
        "line 2: " + str(folder / "a/missing.flac") + " is not there",
        "line 3 has no text",
        "line 4: id a/one is there twice",
        "line 5: noise is no audio file",
        "line 6 has no audio",
        "unknown column languag: did you mean language?",
        "line 7: audio 3",
        "line 7: text 4",
        "line 8: sampling_rate -1",
    ):
        assert complaint in message
    assert "line 1" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_same_unknown_column_is_named_once_and_long_lists_are_cut(folder, tmp_path):
    rows = [{"audio": f"{n}.wav", "text": "x", "speaker": "y"} for n in range(50)]
    with pytest.raises(UserError) as error:
        pack(_jsonl(folder, rows), tmp_path / "out")
    assert str(error.value).count("unknown column speaker") == 1
    with pytest.raises(UserError, match="and 30 more"):
        pack(_jsonl(folder, [{"audio": f"{n}.wav", "text": "x"} for n in range(50)]), tmp_path / "out")


def test_a_folder_that_is_not_empty_is_not_overwritten(folder, tmp_path):
    (tmp_path / "out").mkdir()
    pack(folder, tmp_path / "out")
    with pytest.raises(UserError, match="not an empty folder"):
        pack(folder, tmp_path / "out")
    assert len(_read(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("m.jsonl", '{"audio": ', "m.jsonl line 1 is not JSON"),
        ("m.jsonl", "[]", "not a JSON object"),
        ("m.jsonl", "\n", "no rows"),
        ("m.csv", "audio,text\na,b,c\n", "m.csv line 2 has more cells"),
        ("m.xlsx", "", "is no manifest"),
        ("m.parquet", "hello", "m.parquet is no Parquet file"),
    ],
)
def test_a_manifest_that_can_not_be_read_is_refused(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        pack(tmp_path / name, tmp_path / "out")


def test_a_source_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        pack(tmp_path / "nowhere.csv", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither audio files nor"):
        pack(tmp_path / "empty", tmp_path / "out")


def test_a_remote_target_is_refused(folder):
    with pytest.raises(UserError, match="remote"):
        pack(folder, Path("gs://bucket/out"))
