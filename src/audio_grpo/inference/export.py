"""A run as a complete published-layout checkpoint."""

from pathlib import Path

from audio_grpo.config import load_config
from audio_grpo.model.checkpoint import create_published, write_published
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import create_session
from audio_grpo.training.weights import run_weights


def export(run_path: str, out: Path) -> Path:
    """Write a run's newest weights to `out`, with the tokenizer.

    Where the run departed from a published checkpoint, everything that training did not touch is carried over byte
    for byte; otherwise the folder is made whole.

    Raises:
        UserError: `run_path` is no run, or `out` exists.
    """
    run = RunFolder.open(run_path)
    session = create_session(load_config(str(run.config_path)))
    found = run_weights(session, run)
    if found.published is not None:
        write_published(found.weights, session.table, out, source=found.published, changed=found.trained)
        return out
    create_published(found.weights, session.spec, out, family=session.config.decoder_block, special=session.special)
    session.tokenizer.backend.save(str(out / "tokenizer.json"))
    return out
