"""One self-contained HTML file: no network, no file beside it."""

import base64
import hashlib
from importlib import resources

from etils import epath

from audio_grpo.report.completions import completions
from audio_grpo.report.curves import curves
from audio_grpo.report.evaluation import evaluation
from audio_grpo.report.markup import Html, tag
from audio_grpo.report.overview import heading, result, setup
from audio_grpo.report.run_data import RunData
from audio_grpo.training.run_folder import RunFolder


def build_report(run: epath.PathLike) -> epath.Path:
    """Writes the report of a run, finished or not, and returns its path.

    Raises UserError where `run` is not the folder of a run or holds files that no run wrote.
    """
    data = RunData.read(RunFolder.open(run))
    data.folder.report_path.write_text(_page(data))
    return data.folder.report_path


def _page(run: RunData) -> str:
    sections = {
        "Result": result(run),
        "Set-up": setup(run),
        "Curves": curves(run),
        "Completions": completions(run),
        "Evaluation": evaluation(run),
        "Configuration": tag("details", tag("summary", "Every key"), tag("pre", run.config_text)),
    }
    script = _packaged("report.js")
    head = tag(
        "head",
        _void("meta", charset="utf-8"),
        _void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _void("meta", name="color-scheme", content="light dark"),
        _void("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("title", f"{run.folder.path.name} – audio-grpo"),
        tag("style", _packaged("report.css")),
    )
    links = [tag("a", title, href=f"#{title}") for title in sections]
    bodies = [tag("section", tag("h2", title), body, id=title) for title, body in sections.items()]
    body = tag("body", tag("nav", *links), tag("main", heading(run), *bodies), tag("script", script))
    page = tag("html", head, body, lang="en")
    return f"<!doctype html>\n{page}\n"


def _policy(script: str) -> str:
    """Nothing may be fetched, and no script may run but ours, whatever a transcript holds."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; media-src data:; script-src 'sha256-{digest}'"


def _packaged(name: str) -> Html:
    return Html(resources.files("audio_grpo.report").joinpath(name).read_text(encoding="utf-8"))


def _void(name: str, /, **attributes: str) -> Html:
    return Html(tag(name, **attributes).removesuffix(f"</{name}>"))
