"""What every verb that runs the model stands on: mesh, sizes, weight table, tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.model.lora import lora_table
from audio_grpo.model.spec import ThinkerSpec, resolve_dtype, thinker_spec
from audio_grpo.model.table import Table, sharding_of
from audio_grpo.model.thinker import thinker_table
from audio_grpo.parallel.mesh import create_mesh
from audio_grpo.text import ReasoningTags, Tokenizer, load_tokenizer
from audio_grpo.types import SpecialTokens


@dataclass(frozen=True, slots=True)
class Session:
    """A configuration's model on this machine's devices, without its weights."""

    config: Config
    mesh: Mesh
    spec: ThinkerSpec
    base: Table
    """The model's own weights."""
    adapters: Table
    """LoRA weights that the configuration adds."""
    tokenizer: Tokenizer
    special: SpecialTokens

    @property
    def table(self) -> Table:
        """All weights."""
        return {**self.base, **self.adapters}

    @property
    def weight_dtype(self) -> jnp.dtype:
        """Of stored weights."""
        return jnp.dtype(resolve_dtype(self.config.weight_dtype, self.mesh))

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        """Sharding of every weight."""
        return {key: sharding_of(self.mesh, key, weight) for key, weight in self.table.items()}

    @property
    def abstract_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of every weight."""
        dtype, shardings = self.weight_dtype, self.shardings
        return {
            key: jax.ShapeDtypeStruct(weight.shape, dtype, sharding=shardings[key])
            for key, weight in self.table.items()
        }

    @property
    def tags(self) -> ReasoningTags:
        """The configured tags around reasoning and answer."""
        return ReasoningTags.from_config(self.config)

    @property
    def trainable(self) -> frozenset[str]:
        """Keys of the weights that training changes: the adapters, or all that is not frozen."""
        if self.adapters:
            return frozenset(self.adapters)
        frozen = ("audio_tower.",) if self.config.freeze_audio_encoder_params else ()
        return frozenset(key for key in self.table if not key.startswith(frozen))

    @property
    def devices(self) -> str:
        """Number and kind, e.g. "4 x TPU v4"."""
        return f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"


def create_session(config: Config, devices: Sequence[Any] | None = None) -> Session:
    """Build a configuration's model on given devices, all that are present by default."""
    if config.jax_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(config.jax_cache_dir).expanduser()))
    mesh = create_mesh(config, devices)
    spec = thinker_spec(config, mesh)
    tokenizer = load_tokenizer(config.tokenizer_path)
    special = tokenizer.special_tokens(config.decoder_block, config.vocab_size)
    base = thinker_table(spec)
    return Session(config, mesh, spec, base, _adapters(config, base), tokenizer, special)


def _adapters(config: Config, base: Table) -> Table:
    if not config.lora_rank:
        return {}
    adapters = lora_table(base, rank=config.lora_rank, targets=config.lora_target_modules)
    if config.freeze_audio_encoder_params and any(key.startswith("audio_tower.") for key in adapters):
        raise UserError(
            f"lora_target_modules {config.lora_target_modules} adapts the audio tower, but freeze_audio_encoder_params "
            "freezes it: change one of the two."
        )
    return adapters
