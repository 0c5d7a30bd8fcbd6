"""A checkpoint opened for use: a published folder or a run of ours."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from audio_grpo.config import Config, DecoderBlock, load_config
from audio_grpo.errors import UserError
from audio_grpo.model.checkpoint import read_published, spec_from_published
from audio_grpo.model.checkpoint.folder import read_json
from audio_grpo.model.spec import ThinkerSpec, resolve_dtype, thinker_spec
from audio_grpo.model.thinker import thinker_table
from audio_grpo.parallel.mesh import create_mesh
from audio_grpo.text import Tokenizer, family_special_tokens, load_tokenizer
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import create_session
from audio_grpo.training.weights import run_weights
from audio_grpo.types import SpecialTokens

_FAMILY_TOKENIZER: dict[DecoderBlock, str] = {
    "qwen3_omni": "Qwen/Qwen3-Omni-30B-A3B-Instruct",
    "qwen3_asr": "Qwen/Qwen3-ASR-0.6B",
}


@dataclass(frozen=True, slots=True)
class OpenModel:
    """Weights on this machine's devices, and what prompts need."""

    config: Config
    mesh: Mesh
    spec: ThinkerSpec
    weights: dict[str, Array]
    special: SpecialTokens
    tokenizer: Tokenizer | None
    """None where the folder has none and its vocabulary is not the family's: rows of token ids need no tokenizer."""

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: there is none.
        """
        if self.tokenizer is None:
            raise UserError(
                "The checkpoint has no tokenizer.json, and its vocabulary is too small for its family's tokenizer: add "
                "the file, or give prompt_token_ids and completion_token_ids instead of text."
            )
        return self.tokenizer


def open_checkpoint(path: str) -> OpenModel:
    """Open a published-layout folder (config.json and safetensors) or a run of ours (its newest weights).

    Raises:
        UserError: the folder is neither, or what it holds is damaged or not supported.
    """
    folder = Path(path).expanduser()
    if (folder / "config.yml").exists():
        return _open_run(RunFolder.open(path))
    if (folder / "config.json").exists():
        return _open_published(folder)
    raise UserError(
        f"--checkpoint {path} is neither a published checkpoint (config.json and safetensors) nor a run (config.yml)."
    )


def _open_run(run: RunFolder) -> OpenModel:
    session = create_session(load_config(str(run.config_path)))
    weights = run_weights(session, run).weights
    return OpenModel(session.config, session.mesh, session.spec, weights, session.special, session.tokenizer)


def _open_published(folder: Path) -> OpenModel:
    published = spec_from_published(folder)
    family = published.settings["decoder_block"]
    template = "qwen3-asr" if family == "qwen3_asr" else "transcript"
    config = Config.model_validate({**published.settings, "template": template, "tokenizer_path": str(folder)})
    mesh = create_mesh(config)
    spec = thinker_spec(config, mesh)
    tokenizer = _tokenizer_of(folder, config)
    special = _special_of_ids(folder, config, published.audio_pad)
    if tokenizer is not None:
        special = tokenizer.special_tokens(family, config.vocab_size)
    dtype = jnp.dtype(resolve_dtype(config.weight_dtype, mesh))
    return OpenModel(config, mesh, spec, read_published(folder, thinker_table(spec), mesh, dtype), special, tokenizer)


def _tokenizer_of(folder: Path, config: Config) -> Tokenizer | None:
    """The folder's own, else the family's if the vocabulary holds it."""
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        return load_tokenizer(str(folder))
    tokenizer = load_tokenizer(_FAMILY_TOKENIZER[config.decoder_block])
    return tokenizer if tokenizer.vocab_size <= config.vocab_size else None


def _special_of_ids(folder: Path, config: Config, audio_pad: int | None) -> SpecialTokens:
    """The family's ids where the vocabulary holds them, else what the folder's own files say."""
    try:
        return family_special_tokens(config.decoder_block, config.vocab_size)
    except UserError:
        if audio_pad is None:
            raise
    stop = _stop_ids(folder, config.vocab_size)
    return SpecialTokens(
        audio_pad=audio_pad,
        audio_start=audio_pad,
        audio_end=audio_pad,
        im_start=audio_pad,
        im_end=stop[0] if stop else audio_pad,
        pad=stop[0] if stop else audio_pad,
        stop=stop,
        never_sampled=((audio_pad, audio_pad + 1),),
    )


def _stop_ids(folder: Path, vocab: int) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    given = read_json(path).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int and 0 <= i < vocab for i in ids):
        raise UserError(f"{path}: eos_token_id is {given}, but must be one or several ids from 0 to {vocab - 1}.")
    return tuple(ids)
