import json
import math

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.errors import UserError
from audio_grpo.training.json_lines import JsonLinesFile, decode_record, encode_record

NAMES = st.text(min_size=1).filter(lambda name: name != "non_finite")
VALUES = st.text() | st.integers() | st.floats() | st.none() | st.booleans()
RECORDS = st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, min_size=1))


@pytest.fixture
def file(tmp_path) -> JsonLinesFile:
    return JsonLinesFile(epath.Path(tmp_path) / "lines.jsonl")


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@given(RECORDS)
def test_any_record_is_one_line_of_valid_json_and_comes_back(record):
    line = encode_record(record)
    assert "\n" not in line
    json.loads(line, parse_constant=refuse_constant)
    assert repr(decode_record(line)) == repr(decode_record(encode_record(decode_record(line))))
    for name, value in decode_record(line).items():
        assert value == record[name] or repr(value) == repr(record[name])


def test_a_number_that_is_not_finite_becomes_null_and_a_note():
    line = encode_record({"step": 3, "kl": math.nan, "rewards": {"wer": -math.inf, "format": 1.0}})
    assert json.loads(line) == {
        "step": 3,
        "kl": None,
        "rewards": {"wer": None, "format": 1.0},
        "non_finite": {"kl": "nan", "rewards": {"wer": "-inf"}},
    }
    assert decode_record(line)["rewards"] == {"wer": -math.inf, "format": 1.0}


def test_a_number_that_is_not_finite_is_refused_inside_a_list():
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_record({"rates": [math.nan]})


def test_line_separators_inside_text_do_not_end_a_line(file):
    texts = ["a\u2028b", "c\x85d", "e\nf\r\ng", "ذهب"]
    for text in texts:
        file.append({"text": text})
    assert [record["text"] for record in file.read().records] == texts


def test_an_unfinished_line_is_told_apart_and_goes_when_the_file_is_taken_up_again(file, tmp_path):
    file.append({"step": 1})
    with (tmp_path / "lines.jsonl").open("a") as torn:
        torn.write('{"step": 2, "lo')
    assert file.read() == ([{"step": 1}], '{"step": 2, "lo')
    file.keep(bool)
    file.append({"step": 2})
    assert file.read() == ([{"step": 1}, {"step": 2}], "")


def test_a_file_that_does_not_exist_is_empty_and_stays_so(file, tmp_path):
    file.keep(bool)
    assert file.read() == ([], "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["what", "3", "[]", ""])
def test_a_damaged_line_is_refused_by_its_number(file, tmp_path, line):
    (tmp_path / "lines.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=r"Line 2 of .*lines\.jsonl is not a JSON object"):
        file.read()


class StoreWithoutAppend(MemoryFileSystem):
    """As object stores are."""

    protocol = ("az",)

    def open(self, path, mode="rb", **options):
        assert "a" not in mode, "object stores can not append"
        return super().open(path, mode, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("az://").strip("/")


def test_lines_are_kept_in_stores_that_can_not_append():
    fsspec.register_implementation("az", StoreWithoutAppend, clobber=True)
    file = JsonLinesFile(epath.Path("az://bucket/run/metrics.jsonl"))
    file.append({"step": 1})
    file.append({"step": 2})
    file.keep(lambda record: record["step"] <= 1)
    file.append({"step": 3})
    assert file.read().records == [{"step": 1}, {"step": 3}]
