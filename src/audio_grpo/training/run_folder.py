"""Where a run keeps what."""

import json
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Self

from etils import epath

from audio_grpo.errors import UserError
from audio_grpo.training.evaluation_report import EvaluationReport
from audio_grpo.training.json_lines import JsonLinesFile

_PACKAGES = ("audio-grpo", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "grain")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run, local or at a gs:// or s3:// address."""

    path: epath.Path

    @classmethod
    def create(cls, base_output_directory: str, run_name: str) -> Self:
        """Makes the folder of a new run; one that exists is taken as it is, so that its run can go on."""
        run = cls(epath.Path(base_output_directory).expanduser() / run_name)
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    @classmethod
    def open(cls, path: epath.PathLike) -> Self:
        """The folder of a run that has begun; raises UserError where `path` is none."""
        run = cls(epath.Path(path).expanduser())
        if not run.config_path.exists():
            raise UserError(
                f"{run.path} is not the folder of a run: it has no {run.config_path.name}. Give the folder that "
                "train or sft wrote, which is base_output_directory/run_name."
            )
        return run

    @property
    def config_path(self) -> epath.Path:
        """The resolved configuration."""
        return self.path / "config.yml"

    @property
    def environment_path(self) -> epath.Path:
        """Devices and package versions, see `write_environment`."""
        return self.path / "environment.json"

    @property
    def metrics_path(self) -> epath.Path:
        """One line for each step, see `telemetry.MetricsWriter`."""
        return self.path / "metrics.jsonl"

    @property
    def completions_path(self) -> epath.Path:
        """Sampled completions, see `telemetry.SampledCompletion`."""
        return self.path / "completions.jsonl"

    @property
    def evaluations_path(self) -> epath.Path:
        """One line for each evaluation, see `EvaluationReport`."""
        return self.path / "evaluations.jsonl"

    @property
    def checkpoints(self) -> epath.Path:
        """Folder of training checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> epath.Path:
        """Folder of TensorBoard events, with one folder for each phase."""
        return self.path / "tensorboard"

    @property
    def clips(self) -> epath.Path:
        """Folder of the audio that sampled completions answer."""
        return self.path / "clips"

    @property
    def report_path(self) -> epath.Path:
        """The HTML report."""
        return self.path / "report.html"

    def write_environment(self, devices: str) -> None:
        """Notes what the run runs on.

        Args:
            devices: Number and kind, e.g. "4 × TPU v4".
        """
        versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}
        self.environment_path.write_text(json.dumps({"devices": devices, "versions": versions}, indent=2) + "\n")

    def write_evaluation(self, report: EvaluationReport) -> None:
        """Adds an evaluation; those of its stage that come no earlier are what a resumed run repeats, and go."""
        file = JsonLinesFile(self.evaluations_path)
        file.keep(lambda record: record["stage"] != report.stage or record["step"] < report.step)
        file.append(report.to_record())
