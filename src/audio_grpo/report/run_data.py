"""Everything a report is made of, read from a run folder."""

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self, get_args

import yaml

from audio_grpo.config import NormalizerName
from audio_grpo.errors import UserError
from audio_grpo.text.normalizers import Normalizer, get_normalizer
from audio_grpo.training.evaluation_report import EvaluationReport
from audio_grpo.training.json_lines import JsonLinesFile, Record
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.telemetry import SampledCompletion


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run, as far as it has come."""

    folder: RunFolder
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any] | None
    """None where the run did not note what it runs on."""
    metrics: dict[str, list[Record]]
    """Phase to its steps' lines, in rising order of steps."""
    completions: list[SampledCompletion]
    evaluations: list[EvaluationReport]
    missing: list[str]
    """Sentences that say what the report does not have."""

    @classmethod
    def read(cls, folder: RunFolder) -> Self:
        """Reads a run that may still be going; raises UserError for files that are not what a run writes."""
        missing: list[str] = []
        metrics: dict[str, list[Record]] = defaultdict(list)
        for record in _read_lines(folder, "metrics", missing):
            metrics[record["phase"]].append(record)
        completions = [SampledCompletion.from_record(each) for each in _read_lines(folder, "completions", missing)]
        evaluations = [EvaluationReport.from_record(each) for each in _read_lines(folder, "evaluations", missing)]
        config_text = folder.config_path.read_text()
        config = _read_config(folder, config_text)
        _refuse_unknown_normalizers([config.get("text_normalizer"), *(each.text_normalizer for each in evaluations)])
        missing += _unreached(config, metrics)
        environment_path = folder.environment_path
        environment = json.loads(environment_path.read_text()) if environment_path.exists() else None
        if environment is None:
            missing.append(f"No {environment_path.name}: devices and versions are not known.")
        return cls(
            folder=folder,
            config=config,
            config_text=config_text,
            environment=environment,
            metrics=dict(metrics),
            completions=completions,
            evaluations=evaluations,
            missing=missing,
        )

    @property
    def normalizer(self) -> Normalizer:
        """What rewards compared transcripts by."""
        return get_normalizer(self.config["text_normalizer"])


def _read_lines(folder: RunFolder, kind: str, missing: list[str]) -> list[Record]:
    path = folder.path / f"{kind}.jsonl"
    records, unfinished = JsonLinesFile(path).read()
    if unfinished:
        missing.append(f"The last line of {path.name} is unfinished and is left out.")
    if not records:
        missing.append(f"No {kind} yet.")
    return records


def _read_config(folder: RunFolder, text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{folder.config_path} is not YAML ({error}): restore what the run wrote.") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder.config_path} holds no configuration keys: restore what the run wrote.")
    return config


def _refuse_unknown_normalizers(names: list[object]) -> None:
    known = get_args(NormalizerName)
    for name in names:
        if name not in known:
            raise UserError(
                f"The run names the text_normalizer {name!r}, which this version does not have; it has "
                f"{', '.join(known)}. Make the report with the version that the run was made with."
            )


def _unreached(config: dict[str, Any], metrics: dict[str, list[Record]]) -> list[str]:
    steps = config.get("steps")
    return [
        f"{phase.upper()} has {lines[-1]['step']} of {steps} steps: it is still going, or it was stopped."
        for phase, lines in metrics.items()
        if steps is not None and lines[-1]["step"] < steps
    ]
