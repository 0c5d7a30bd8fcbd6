"""Our side of a question of memory: what the learner's programs take, compiled and not run."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ours import config_of, settings_of
from reference_work import Work
from worker import Job, serve

from audio_grpo.config import load_config
from audio_grpo.model.spec import compute_dtype, thinker_spec
from audio_grpo.model.thinker import thinker_table
from audio_grpo.parallel.libtpu import quiet_without_tpu
from audio_grpo.plan.topology import compile_ahead, parse_topology, topology_devices
from audio_grpo.training.programs import run_programs
from audio_grpo.training.session import Session, create_session

PHASES = ("scoring", "gradients")


def temporaries(model: str, work: dict[str, Any], vocab: int | None = None) -> dict[str, Any]:
    """Bytes of each program's temporaries, and of one hidden state for each completion token.

    All prompts of the work go through the programs together. `vocab` takes the place of the model's vocabulary.
    """
    asked = Work(**work)
    session = _session(model, asked)
    session = session if vocab is None else _with_vocabulary(session, vocab)
    tokens, decoder = asked.completions * asked.tokens, session.spec.decoder
    sizes = {
        "tokens": tokens,
        "vocab": decoder.vocab,
        "hidden": tokens * decoder.width * compute_dtype(session.spec).itemsize,
    }
    programs = {program.phase: program for program in run_programs(session)}
    for phase in PHASES:
        memory = compile_ahead(programs[phase].trace().lower()).memory_analysis()
        assert memory is not None, "this backend does not tell a program's memory"
        sizes[phase] = memory.temp_size_in_bytes
    return sizes


def _session(model: str, work: Work) -> Session:
    """A model's on the device that it is compiled for, which need not be there."""
    if model == "reference":
        return create_session(config_of(work))
    preset, topology = model.split()
    settings = {**settings_of(work), "jax_cache_dir": ""}
    config = load_config(preset, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    return create_session(config, topology_devices(parse_topology(topology)))


def _with_vocabulary(session: Session, vocab: int) -> Session:
    """The tokenizer's own tokens may be beyond it: good for compiling alone."""
    config = session.config.model_copy(update={"vocab_size": vocab})
    spec = thinker_spec(config, session.mesh)
    return replace(session, config=config, spec=spec, base=thinker_table(spec))


def _start() -> Mapping[str, Job]:
    quiet_without_tpu()
    return {"temporaries": temporaries}


if __name__ == "__main__":
    serve(_start)
