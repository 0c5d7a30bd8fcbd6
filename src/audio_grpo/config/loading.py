"""From files and `key=value` overrides to a `Config`, and back to a file.

Later wins: the schema's defaults, the model's file, the `base_config` chain from its root, the file, the overrides.
"""

from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from audio_grpo.config.files import (
    MODELS,
    find_base,
    find_configuration,
    label,
    model_files,
    nearest,
    preset_names,
    presets_sentence,
    read_mapping,
)
from audio_grpo.config.problems import Setting, show, validate
from audio_grpo.config.schema import AudioTowerKeys, Config, DecoderKeys
from audio_grpo.config.yaml_text import dump_mapping, parse_value
from audio_grpo.errors import UserError

_MODEL_KEYS = DecoderKeys.model_fields.keys() | AudioTowerKeys.model_fields.keys()


def initialize(argv: Sequence[str]) -> Config:
    """The configuration that `[CONFIG, "key=value", …]` describes.

    Args:
        argv: a configuration file or a preset's name, then overrides.

    Raises:
        UserError: as `load_config`, and where nothing is given.
    """
    if not argv:
        raise UserError(f"No configuration is given: name a file or a preset. {presets_sentence()}")
    return load_config(argv[0], argv[1:])


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file or preset with overrides, checked as a whole.

    Args:
        source: path of a YAML file (local, gs://, s3://), or a preset's name.
        overrides: texts `key=value`, the value in YAML, e.g. "learning_rate=1e-5".

    Raises:
        UserError: one message with a line for every unknown key, wrong value and contradiction.
    """
    path = find_configuration(source)
    overriding = _parse_overrides(overrides)
    chain = _read_chain(path)
    stated = chain.settings | overriding.settings
    model = _read_model(path, stated, chain.files)
    config, faults = validate(model.settings | stated)
    problems = [*chain.problems, *model.problems, *overriding.problems, *faults]
    if config is None or problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n- ".join([f"The configuration {source} has {count}:", *problems]))
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration, every key with its value, as a file that loads to an equal `Config`."""
    values = config.model_dump()
    return "\n".join(
        f"# {(section.__doc__ or '').splitlines()[0]}\n"
        + dump_mapping({key: values[key] for key in section.model_fields})
        for section in Config.__bases__
    )


class _Layer(NamedTuple):
    settings: dict[str, Setting]
    files: frozenset[epath.Path]
    problems: list[str]


def _read_chain(path: epath.Path, above: frozenset[epath.Path] = frozenset()) -> _Layer:
    """A file over the files that its `base_config` names."""
    files = above | {path.resolve()}
    if files == above:
        raise UserError(f"base_config of {label(path)} leads back to itself: {', '.join(sorted(map(label, files)))}")
    values, problems = read_mapping(path)
    base = values.pop("base_config", None)
    settings = {key: Setting(value, f"in {label(path)}") for key, value in values.items()}
    if base is None:
        return _Layer(settings, files, problems)
    if not isinstance(base, str):
        return _Layer(settings, files, [*problems, f"base_config: {show(base)} (in {label(path)}): it names one file"])
    below = _read_chain(find_base(path, base), files)
    return _Layer(below.settings | settings, below.files, below.problems + problems)


def _read_model(path: epath.Path, stated: dict[str, Setting], read: frozenset[epath.Path]) -> _Layer:
    """The model's file; one that the configuration itself consists of is not read again."""
    name = stated.get("model_name", Setting(Config.model_fields["model_name"].default, "by default"))
    nothing = _Layer({}, frozenset(), [])
    if not isinstance(name.value, str):
        return nothing
    candidates = model_files(path, name.value)
    unread = [candidate for candidate in candidates if candidate.resolve() not in read]
    if unread:
        return _read_chain(unread[0])
    # A resolved configuration states the whole model itself, wherever it is moved.
    if candidates or stated.keys() >= _MODEL_KEYS:
        return nothing
    near = nearest(name.value, preset_names(MODELS))
    hint = "" if near is None else f"; the nearest preset is {near}"
    sentence = (
        f"model_name: {show(name.value)} ({name.origin}): there is no {name.value}.yml beside {label(path)} or in "
        f"models/ there, and no such model preset among {', '.join(preset_names(MODELS))}{hint}"
    )
    return nothing._replace(problems=[sentence])


def _parse_overrides(overrides: Sequence[str]) -> _Layer:
    settings: dict[str, Setting] = {}
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"{override} (on the command line) is no override: write key=value")
        elif key in settings:
            problems.append(f"{key} (on the command line) is given more than once: keep one")
        elif key == "base_config":
            problems.append("base_config (on the command line) can stand only in a file: give that file as CONFIG")
        else:
            try:
                settings[key] = Setting(parse_value(text), "on the command line")
            except ValueError as error:
                problems.append(f"{override} (on the command line) is not valid YAML: {error}; quote the value")
    return _Layer(settings, frozenset(), problems)
