"""Loops and wrong scripts are found in every script, and are not seen where there are none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.rewards import falls_into_loop, is_in_wrong_script

ARABIC, ENGLISH, CHINESE = "ذهب الولد إلى المدرسة", "the boy went to school", "男孩去上学了"
JAPANESE, RUSSIAN = "東京タワーへ行きました", "мальчик пошёл в школу"


@pytest.mark.parametrize(
    "text",
    [
        "seven seven seven seven",
        "Seven seven SEVEN seven lamps",
        "a b a b a b a b",
        "<answer>in the hall in the hall in the hall in the hall",
        "شكرا شكرا شكرا شكرا",
        "ذهب الولد إلى المدرسة المدرسة المدرسة المدرسة المدرسة",
        "好的好的好的好的",
        "\n\n\n\n\n\n\n\n\n",
    ],
)
def test_what_is_said_four_times_in_a_row_is_a_loop(text: str) -> None:
    assert falls_into_loop(text, "seven lamps")
    assert not falls_into_loop(text, text), "the speaker said so"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no no no",
        "seven seven seventh seven",
        "a million is 1000000",
        "schifffahrt und zoooologie",
        "هههه",
        *(ARABIC, ENGLISH, CHINESE, JAPANESE),
    ],
)
def test_ordinary_texts_have_no_loop(text: str) -> None:
    assert not falls_into_loop(text, "")


@given(st.text("abج ", min_size=2, max_size=20).filter(lambda x: x[0] != x[-1]), st.text("cd", max_size=5))
def test_any_text_of_some_length_repeated_often_is_a_loop(unit: str, before: str) -> None:
    assert falls_into_loop(before + unit * 4, "")


@given(st.text(max_size=6), st.text(max_size=6))
def test_a_loop_is_a_unit_that_a_plain_search_finds(text: str, more: str) -> None:
    text = (text + more) * 3 + text + " "
    folded = text.casefold() + " "
    spans = ((i, n) for n in range(2, 65) for i in range(len(folded) - 4 * n + 1))
    assert falls_into_loop(text, "") == any(folded[i : i + 4 * n] == folded[i : i + n] * 4 for i, n in spans)


@pytest.mark.parametrize(
    ("text", "reference", "wrong"),
    [
        (ENGLISH, ARABIC, True),
        (ARABIC, ENGLISH, True),
        (RUSSIAN, ENGLISH, True),
        (ENGLISH, CHINESE, True),
        ("dhahaba al-waladu إلى المدرسة", ARABIC, True),
        ("ذهب الولد إلى school", ARABIC, False),
        ("مدرسہ کو گیا", ARABIC, False),
        ("إشترى هاتف iPhone", "إشترى هاتف آيفون", False),
        (ENGLISH, "إشترى هاتف iPhone", True),
        ("إشترى هاتف iPhone", "إشترى هاتف iPhone", False),
        ("トウキョウタワー", JAPANESE, False),
        ("東京塔", JAPANESE, False),
        ("Tōkyō", JAPANESE, True),
        ("ＡＢＣ", ENGLISH, False),
        ("12 34", ARABIC, False),
        ("", ARABIC, False),
        (ENGLISH, "1234 …", False),
    ],
)
def test_most_letters_decide_about_the_script(text: str, reference: str, wrong: bool) -> None:
    assert is_in_wrong_script(text, reference) == wrong


@given(st.text("aбجあ愛x1 "))
def test_no_text_is_in_another_script_than_itself(text: str) -> None:
    assert not is_in_wrong_script(text, text)
