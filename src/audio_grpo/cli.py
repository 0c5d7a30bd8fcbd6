"""The command line: one verb, one function, and no logic of its own."""

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from audio_grpo.errors import UserError
from audio_grpo.parallel.libtpu import quiet_without_tpu

app = typer.Typer(
    help="GRPO post-training of speech models on word error rate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Make, pack and inspect data sets.", no_args_is_help=True)
app.add_typer(data, name="data")

ConfigSource = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file or a preset's name.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Keys set on top of it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def train(config: ConfigSource, overrides: Overrides = None) -> None:
    """Post-train with GRPO."""
    from audio_grpo.config import load_config
    from audio_grpo.training import train_loop

    _finish(train_loop(load_config(config, overrides or [])))


@app.command()
def sft(config: ConfigSource, overrides: Overrides = None) -> None:
    """Warm up on transcripts, with the same data and template."""
    from audio_grpo.config import load_config
    from audio_grpo.training import sft_loop

    _finish(sft_loop(load_config(config, overrides or [])))


@app.command()
def evaluate(config: ConfigSource, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Corpus WER and CER of a run's newest weights, by language and duration."""
    from audio_grpo.config import load_config
    from audio_grpo.parallel.processes import is_first
    from audio_grpo.tables import evaluation_table
    from audio_grpo.training import evaluate_run

    report = evaluate_run(load_config(config, overrides or []))
    if is_first():
        print(report.to_json() if as_json else evaluation_table(report))


@app.command()
def verify(config: ConfigSource, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a configuration on this machine, line by line."""
    from audio_grpo.config import load_config
    from audio_grpo.training.verify import verify_run

    checks = verify_run(load_config(config, overrides or []))
    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], ensure_ascii=False))
    else:
        print("\n".join(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.measured}" for check in checks))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigSource,
    overrides: Overrides = None,
    topology: Annotated[
        str | None, typer.Option(help="A TPU slice such as v4-8 or v5e-4; this machine's devices if left out.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="Write a picture (SVG) there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile a run's programs ahead of time: memory per chip, least time, and what fits."""
    from audio_grpo.config import load_config
    from audio_grpo.plan import Planner, limits, plan_chart, plan_json, plan_text, remedies

    loaded = load_config(config, overrides or [])
    planner = Planner(topology, loaded)
    result = planner.plan()
    told = (result, limits(planner, loaded, result), list(remedies(loaded, result)))
    if chart:
        chart.write_text(plan_chart(result))
    print(json.dumps(plan_json(*told)) if as_json else plan_text(*told))


@app.command("config")
def show_config(config: ConfigSource, overrides: Overrides = None) -> None:
    """Print the resolved configuration."""
    from audio_grpo.config import load_config, to_yaml

    print(to_yaml(load_config(config, overrides or [])), end="")


@app.command()
def report(run: Annotated[str, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report as one HTML file."""
    from audio_grpo.report import build_report

    print(build_report(run))


Checkpoint = Annotated[str, typer.Option(help="A published-layout folder, or a run of ours.")]
Manifest = Annotated[str, typer.Option(help="Rows with `audio` and, optionally, `prompt_token_ids`.")]


@app.command()
def transcribe(
    audio: Annotated[list[str], typer.Argument(help="Audio or video files.")],
    checkpoint: Checkpoint,
    language: Annotated[str | None, typer.Option(help="English name of the language spoken.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Instruction after the clip; for Qwen3-ASR, context.")] = None,
    as_json: AsJson = False,
) -> None:
    """Transcribe files."""
    from audio_grpo import inference

    for transcript in inference.transcribe(
        inference.open_checkpoint(checkpoint), audio, language=language, prompt=prompt
    ):
        if transcript.finish_reason == "length":
            print(f"audio-grpo: {transcript.audio}: the text is not whole, its tokens ran out.", file=sys.stderr)
        name = f"{transcript.audio}: " if len(audio) > 1 else ""
        print(json.dumps(dataclasses.asdict(transcript), ensure_ascii=False) if as_json else name + transcript.text)


@app.command()
def generate(
    checkpoint: Checkpoint,
    manifest: Manifest,
    num_generations: Annotated[int, typer.Option(min=1, help="Completions for each row.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Sample completions for each row of a manifest, as JSON lines."""
    from audio_grpo import inference

    results = inference.generate(
        inference.open_checkpoint(checkpoint),
        manifest,
        num_generations=num_generations,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    for result in results:
        print(json.dumps(result, ensure_ascii=False))


@app.command()
def score(
    checkpoint: Checkpoint,
    manifest: Manifest,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Divides the logits.")] = 1.0,
) -> None:
    """Log-probabilities of each row's `completion_token_ids` or `text`, as JSON lines."""
    from audio_grpo import inference

    for result in inference.score(inference.open_checkpoint(checkpoint), manifest, temperature=temperature):
        print(json.dumps(result))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Write the LoRA adapters as PEFT does.")] = False,
) -> None:
    """Write a run as a complete published-layout checkpoint, its adapters merged."""
    from audio_grpo import inference

    print((inference.export_adapters if adapter_only else inference.export)(run, out))


@data.command("synthesize")
def data_synthesize(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    kind: Annotated[
        Literal["speech", "tones"], typer.Option(help="Spoken words, or tones that spell them.")
    ] = "speech",
    count: Annotated[int, typer.Option(help="Clips.")] = 32,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make ArrayRecord data: synthetic speech with held-out speakers, or tones."""
    from audio_grpo.data import synthesize

    for split, clips in synthesize(out, kind, count, seed).items():
        print(f"{out / split}: {clips} clips")


@data.command("pack")
def data_pack(
    source: Annotated[
        str, typer.Argument(help="JSONL, CSV, TSV, Parquet, or a folder of audio files with .txt beside.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    shards: Annotated[int, typer.Option(help="Files to spread the records over.")] = 1,
) -> None:
    """Pack clips and transcripts into ArrayRecord."""
    from audio_grpo.data import pack

    print(f"{out}: {pack(source, out, shards=shards)} records")


@data.command("inspect")
def data_inspect(path: Annotated[str, typer.Argument(help="A folder, file or glob.")], as_json: AsJson = False) -> None:
    """Counts, hours, languages, lengths, and a look at some records."""
    from audio_grpo.data import inspect
    from audio_grpo.tables import data_table

    summary = inspect(path)
    print(json.dumps(dataclasses.asdict(summary), ensure_ascii=False) if as_json else data_table(summary))


def _finish(run: Any) -> None:
    from audio_grpo.parallel.processes import is_first
    from audio_grpo.report import build_report

    if is_first():
        print(build_report(run.path))


def main() -> None:
    """Run a verb: exit status 0 done, 2 the user's input is at fault, 1 anything else."""
    quiet_without_tpu()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of every optional file that is not there
    try:
        app()
    except UserError as error:
        print(f"audio-grpo: {error}", file=sys.stderr)
        sys.exit(2)
