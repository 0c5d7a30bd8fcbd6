"""YAML as configurations use it: `1e-5` is a number, and a key stands only once."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from audio_grpo.errors import UserError

_EXPONENT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z")


class _Loader(yaml.SafeLoader):
    """Reads plain data."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for something else."""


for _kind in (_Loader, _Dumper):
    # PyYAML follows YAML 1.1, where a float needs a dot; YAML 1.2 and everyone who types 1e-5 disagree.
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds these breaks to spaces unless they are escaped, which only double quotes do.
    breaks = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _text_node)


def parse_value(text: str) -> Any:
    """What one YAML value says, e.g. "1e-5" or "[a, b]".

    Raises:
        ValueError: the text is not one YAML value; the message says why.
    """
    try:
        node, value = yaml.compose(text, _Loader), yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(_where(error)) from error
    rest = text[0 if node is None else node.end_mark.index :].strip()
    if rest:
        raise ValueError(f"{rest!r} would be a comment")
    return value


def parse_mapping(text: str, origin: str) -> tuple[dict[str, Any], list[str]]:
    """The keys and values of a YAML file, and a sentence for each key that stands more than once.

    Args:
        text: the file's content.
        origin: the file's name for messages.

    Raises:
        UserError: the text is not YAML, or not a mapping of keys to values.
    """
    try:
        node, values = yaml.compose(text, _Loader), yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin} is not valid YAML: {_where(error)}") from error
    if values is None:
        return {}, []
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise UserError(f"{origin} holds no keys: a configuration is lines of the form `key: value`")
    return {str(key): value for key, value in values.items()}, _repeated(node, origin)


def dump_mapping(values: Mapping[str, Any]) -> str:
    """The mapping as YAML that `parse_mapping` reads back unchanged."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _repeated(node: yaml.MappingNode, origin: str) -> list[str]:
    counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
    return [f"{key} (in {origin}) stands {count} times: keep one" for key, count in counts.items() if count > 1]


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)
