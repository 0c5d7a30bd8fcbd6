"""Where a tokenizer comes from: a folder, the hub's cache or the hub, or the ranks of an installed package."""

import json
import re
from collections.abc import Sequence

import tokenizers
from etils import epath
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from audio_grpo.config import DecoderBlock
from audio_grpo.errors import UserError
from audio_grpo.text.byte_pairs import Merges, first_byte_pairs, parse_merges, qwen_byte_pairs
from audio_grpo.text.special_tokens import FAMILY_TOKENS, TINY_TOKENS
from audio_grpo.text.tokenizer import Tokenizer

TINY = "audio-grpo/tiny"
TINY_SIZE = 1024

_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"]
_LAYOUT = "tokenizer.json, or vocab.json, merges.txt and tokenizer_config.json"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PROBE_SECONDS = 5.0


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a folder or of a name.

    Args:
        path: a folder with tokenizer.json (or vocab.json, merges.txt and tokenizer_config.json), a name on the
            Hugging Face hub, or "audio-grpo/tiny". Names of Qwen3-Omni and Qwen3-ASR need no network: what the hub's
            cache does not hold is rebuilt from an installed package.

    Raises:
        UserError: nothing of that name can be had, or its files are not a Qwen tokenizer's.
    """
    folder = epath.Path(path).expanduser()
    if _is_folder(folder):
        return Tokenizer(path, _from_folder(folder))
    if path == TINY:
        return Tokenizer(path, _build(*first_byte_pairs(TINY_SIZE - len(TINY_TOKENS)), TINY_TOKENS))
    cached = _hub_cache(path)
    if cached is not None:
        return Tokenizer(path, _from_folder(cached))
    family = _family(path)
    if family is not None:
        return Tokenizer(path, _build(*qwen_byte_pairs(), FAMILY_TOKENS[family]))
    return Tokenizer(path, _from_folder(_download(path)))


def _is_folder(path: epath.Path) -> bool:
    try:
        return path.is_dir()
    except ImportError as error:
        raise UserError(f"{path} is remote: install audio-grpo[remote] to read it ({error})") from error


def _family(name: str) -> DecoderBlock | None:
    """The published models whose tokenizer is known to the byte."""
    if re.match(r"Qwen/Qwen3-Omni-", name):
        return "qwen3_omni"
    return "qwen3_asr" if re.match(r"Qwen/Qwen3-ASR-", name) else None


def _build(vocabulary: dict[str, int], merges: Merges, added: Sequence[AddedToken]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    return backend


def _has_tokenizer(folder: epath.Path) -> bool:
    return (folder / _FILES[0]).exists() or all((folder / name).exists() for name in _FILES[1:])


def _from_folder(folder: epath.Path) -> tokenizers.Tokenizer:
    if not _has_tokenizer(folder):
        raise UserError(f"The folder {folder} holds no tokenizer: put {_LAYOUT} into it")
    try:
        if (folder / _FILES[0]).exists():
            return tokenizers.Tokenizer.from_str((folder / _FILES[0]).read_text())
        return _from_parts(folder)
    except Exception as error:  # the library raises bare Exceptions for malformed files
        raise UserError(f"The tokenizer files in {folder} cannot be read: {type(error).__name__}: {error}") from error


def _from_parts(folder: epath.Path) -> tokenizers.Tokenizer:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = parse_merges((folder / "merges.txt").read_text())
    entries = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    in_order = sorted((int(id_), AddedToken(**entry)) for id_, entry in entries.items())
    backend = _build(vocabulary, merges, [token for _, token in in_order])
    for id_, token in in_order:
        if backend.token_to_id(token.content) != id_:
            raise ValueError(
                f"added_tokens_decoder gives {token.content} the id {id_}, but the ids before it end sooner"
            )
    return backend


def _hub_cache(name: str) -> epath.Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = epath.Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if _has_tokenizer(folder) else None


def _download(name: str) -> epath.Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    missing = f"There is no folder {name!r}, and the hub's cache does not hold its tokenizer"
    remedy = f"Give a folder with {_LAYOUT}, or a name of Qwen3-Omni or Qwen3-ASR"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{missing}; HF_HUB_OFFLINE forbids asking the hub. {remedy}.")
    try:
        # One quick question first: without a network a download would try again for half a minute.
        HfApi().model_info(name, timeout=_PROBE_SECONDS)
        return epath.Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the hub's client lets several libraries' errors through
        raise UserError(f"{missing}; the hub answered: {error}. {remedy}.") from error
