"""Finding and reading configuration files: the user's own, local or remote, and the packaged presets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from rapidfuzz import process

from audio_grpo.config.yaml_text import parse_mapping
from audio_grpo.errors import UserError

PRESETS = epath.Path(Path(__file__).parent / "presets")
MODELS = PRESETS / "models"


def preset_names(folder: epath.Path = PRESETS) -> list[str]:
    """Names of the packaged presets in a folder, e.g. ["base", "grpo_audio_qwen3_omni"]."""
    return sorted(path.stem for path in folder.iterdir() if path.suffix == ".yml")


def nearest(name: str, known: Sequence[str], least: float = 60) -> str | None:
    """The known name that resembles the given one, None where none does."""
    found = process.extractOne(name.lower(), known, processor=str.lower, score_cutoff=least)
    return None if found is None else found[0]


def find_configuration(source: str) -> epath.Path:
    """The file that a command's CONFIG means: a path, else a packaged recipe's or model's name.

    Raises:
        UserError: there is neither; the message lists the presets and the nearest one.
    """
    candidates = [epath.Path(source).expanduser(), PRESETS / f"{source}.yml", MODELS / f"{source}.yml"]
    for path in candidates:
        if is_file(path):
            return path
    names = [*preset_names(), *preset_names(MODELS)]
    near = nearest(source, names)
    hint = "" if near is None else f" The nearest preset is {near}."
    raise UserError(
        f"There is no configuration file {source!r}, and no preset of that name.{hint} {presets_sentence()}"
    )


def presets_sentence() -> str:
    """What can be given without a file."""
    return f"Presets are {', '.join(preset_names())}, and for a model alone {', '.join(preset_names(MODELS))}."


def find_base(path: epath.Path, base: str) -> epath.Path:
    """The file that `base_config` of the file at `path` means: relative to it, else a packaged preset.

    Raises:
        UserError: there is neither.
    """
    candidates = [beside(path, base), PRESETS / base, PRESETS / f"{base}.yml"]
    for candidate in candidates:
        if is_file(candidate):
            return candidate
    raise UserError(
        f"base_config of {label(path)} is {base!r}, but there is no {candidates[0]} and no such preset. "
        f"{presets_sentence()}"
    )


def model_files(path: epath.Path, model_name: str) -> list[epath.Path]:
    """Existing files that describe the model of the configuration at `path`, the closest first."""
    name = f"{model_name}.yml"
    candidates = [beside(path, name), beside(path, f"models/{name}"), MODELS / name]
    return [candidate for candidate in candidates if is_file(candidate)]


def read_mapping(path: epath.Path) -> tuple[dict[str, Any], list[str]]:
    """`parse_mapping` of a file.

    Raises:
        UserError: the file cannot be read, or is no mapping.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{label(path)} cannot be read as text: {error}") from error
    return parse_mapping(text, label(path))


def label(path: epath.Path) -> str:
    """The file's name in messages, e.g. "run.yml" or "preset models/tiny.yml"."""
    return f"preset {path.relative_to(PRESETS)}" if path.is_relative_to(PRESETS) else str(path)


def beside(path: epath.Path, name: str) -> epath.Path:
    """A file named in the file at `path`: an address and an absolute path stand for themselves."""
    return epath.Path(name) if "://" in name else path.parent / epath.Path(name).expanduser()


def is_file(path: epath.Path) -> bool:
    """Whether the file exists.

    Raises:
        UserError: the library for the path's kind of storage is not installed.
    """
    try:
        return path.is_file()
    except ImportError as error:
        raise UserError(f"{path} is remote: install audio-grpo[remote] to read it ({error})") from error
