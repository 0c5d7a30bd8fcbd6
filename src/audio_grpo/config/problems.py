"""Everything that is wrong with a configuration, a sentence each."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from pydantic import ValidationError

from audio_grpo.config.files import nearest
from audio_grpo.config.schema import Config

_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text (in quotes where it looks like a number)",
    "null": "null",
}
_BOUNDS = {"exclusiveMinimum": "above", "minimum": "from", "maximum": "up to", "exclusiveMaximum": "below"}
_SPELLING = {"None": "null", "True": "true", "False": "false"}


class Setting(NamedTuple):
    """A value and where it was given, e.g. (8, "in run.yml")."""

    value: Any
    origin: str


def validate(settings: Mapping[str, Setting]) -> tuple[Config | None, list[str]]:
    """The configuration, or what is wrong with it.

    Where some keys are at fault, contradictions are still looked for among the others.
    """
    try:
        return Config(**{key: setting.value for key, setting in settings.items()}), []
    except ValidationError as error:
        wrong = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors() if detail["loc"])
        if not wrong:
            return None, _contradictions(error)
    _, contradictions = validate({key: setting for key, setting in settings.items() if key not in wrong})
    # A key at fault stood at its default just now, with which nothing needs to agree.
    genuine = [sentence for sentence in contradictions if wrong.keys().isdisjoint(re.findall(r"\w+", sentence))]
    return None, [_fault(key, settings[key]) for key in wrong] + genuine


def show(value: object) -> str:
    """A value as a file writes it, shortened for a message."""
    text = repr(value)
    text = _SPELLING.get(text, text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _contradictions(error: ValidationError) -> list[str]:
    return [line for detail in error.errors() if "ctx" in detail for line in str(detail["ctx"]["error"]).splitlines()]


def _fault(key: str, setting: Setting) -> str:
    given = f"{key}: {show(setting.value)} ({setting.origin})"
    if key in Config.model_fields:
        meaning = Config.model_fields[key].description
        return f"{given}: {key} takes {what_it_takes(key)}" + (f". {meaning}" if meaning else "")
    near = nearest(key, list(Config.model_fields))
    if near is None:
        return f"{given}: there is no such key; `audio-grpo config` prints all of them"
    return f"{given}: there is no such key; the nearest is {near}, which takes {what_it_takes(near)}"


def what_it_takes(key: str) -> str:
    """The values that a key accepts, e.g. "a whole number above 0"."""
    return _describe(_properties()[key])


@cache
def _properties() -> dict[str, dict[str, Any]]:
    return Config.model_json_schema()["properties"]


def _describe(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_describe(option) for option in schema["anyOf"])
    if "const" in schema:
        return f"only {show(schema['const'])}"
    if "enum" in schema:
        return " or ".join(show(option) for option in schema["enum"])
    if schema["type"] == "array":
        return f"a list (each entry {_describe(schema['items'])})"
    if "minLength" in schema:
        return "text that is not empty"
    bounds = [f"{word} {schema[bound]}" for bound, word in _BOUNDS.items() if bound in schema]
    return " ".join([_KINDS[schema["type"]], *bounds])
