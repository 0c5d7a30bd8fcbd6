import pytest
from clips import clip, data_set

from audio_grpo.data.records import decode_record
from audio_grpo.data.source import RecordSource, StoredRecord, Unusable, record_files
from audio_grpo.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return data_set(tmp_path / "set", [clip(n, seconds=0.1) for n in range(5)], shards=2)


def _ids(source: RecordSource) -> list[str | None]:
    return [decode_record(source[i].content).id for i in range(len(source))]


def test_records_are_dealt_out_in_turn_and_files_read_by_name(folder):
    assert sorted(file.name for file in folder.iterdir()) == [
        "data-00000-of-00002.arrayrecord",
        "data-00001-of-00002.arrayrecord",
    ]
    assert _ids(RecordSource(folder)) == ["clip-0", "clip-2", "clip-4", "clip-1", "clip-3"]


def test_a_folder_a_file_and_a_glob_are_found(folder):
    first, second = sorted(map(str, folder.iterdir()))
    assert record_files(folder) == record_files(f"{folder}/*.arrayrecord") == [first, second]
    assert record_files(f"{folder.parent}/s*/*-00001-*") == [second]
    assert record_files(first) == [first]


def test_names_of_other_writers_are_found_and_other_files_left(folder):
    (folder / "README.md").write_text("hello")
    next(folder.glob("*-00000-*")).rename(folder / "x-train.array_record-00000-of-00002")
    assert len(record_files(folder)) == 2


def test_a_folder_of_splits_says_which_ones_there_are(folder):
    folder.rename(folder.parent / "train")
    with pytest.raises(UserError, match="sub-folders train"):
        record_files(folder.parent)


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.arrayrecord"])
def test_what_is_not_there_is_named(tmp_path, path):
    with pytest.raises(UserError, match="nowhere"):
        RecordSource(tmp_path / path)


def test_a_store_that_array_record_does_not_read_is_refused():
    with pytest.raises(UserError, match="Copy it first"):
        record_files("s3://bucket/data")


@pytest.mark.parametrize("content", [b"", b"hello" * 20_000])
def test_a_file_that_is_no_array_record_is_refused(tmp_path, content):
    (tmp_path / "x.arrayrecord").write_bytes(content)
    with pytest.raises(UserError, match="not a complete ArrayRecord file"):
        RecordSource(tmp_path)


def test_a_data_set_without_records_is_refused(tmp_path):
    with pytest.raises(UserError, match="no records"):
        RecordSource(data_set(tmp_path, []))


def test_a_damaged_place_costs_only_its_record(tmp_path):
    folder = data_set(tmp_path, [clip(n, seconds=3) for n in range(30)])
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    at = content.index(b"clip-20")
    content[at : at + 4] = b"????"
    file.write_bytes(content)
    source = RecordSource(folder)
    records = [source[i] for i in range(30)]
    assert records[20] == Unusable("record 20", "the ArrayRecord file is damaged here")
    assert sum(isinstance(record, StoredRecord) for record in records) == 29
