from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.report.markup import Html, breakable, join, table, tag


class Reader(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


TEXT = st.text(st.characters(exclude_characters="\r\x00", exclude_categories=["Cs"]))


@given(TEXT, TEXT)
def test_any_text_stays_text(content, value):
    reader = Reader(tag("p", content, title=value))
    assert reader.tags == [("p", {"title": value})]
    assert reader.text == content


def test_markup_inside_markup_is_kept():
    assert tag("p", tag("b", "a<b")) == "<p><b>a&lt;b</b></p>"
    assert join("<", Html("<br>"), None) == "&lt;<br>"


def test_attributes_that_are_off_are_left_out():
    assert tag("audio", controls=True, loop=False, title=None, class_="x", data_step=3) == (
        '<audio controls class="x" data-step="3"></audio>'
    )


def test_a_long_name_may_break_after_its_marks_and_reads_the_same():
    assert breakable("rewards/a_b:<c>") == "rewards/<wbr>a_<wbr>b:<wbr>&lt;c&gt;"
    assert breakable("kl") == "kl"


def test_columns_after_the_text_are_numbers():
    reader = Reader(table(["Name", "WER"], [["a", "1"]]))
    assert [attributes for name, attributes in reader.tags if name == "td"] == [{}, {"class": "number"}]
