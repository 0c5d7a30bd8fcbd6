"""What every verb that runs the model stands on: mesh, sizes, weight table, tokenizer."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding

from audio_grpo.config import Config
from audio_grpo.model.spec import ThinkerSpec, resolve_dtype, thinker_spec
from audio_grpo.model.table import Table
from audio_grpo.model.thinker import thinker_table
from audio_grpo.parallel.mesh import create_mesh, weight_sharding
from audio_grpo.text import ReasoningTags, Tokenizer, load_tokenizer
from audio_grpo.types import SpecialTokens


@dataclass(frozen=True, slots=True)
class Session:
    """A configuration's model on this machine's devices, without its weights."""

    config: Config
    mesh: Mesh
    spec: ThinkerSpec
    table: Table
    tokenizer: Tokenizer
    special: SpecialTokens

    @property
    def weight_dtype(self) -> jnp.dtype:
        """Of stored weights."""
        return jnp.dtype(resolve_dtype(self.config.weight_dtype))

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        """Sharding of every weight."""
        return {key: weight_sharding(self.mesh, key, w.shape, w.axes) for key, w in self.table.items()}

    @property
    def tags(self) -> ReasoningTags:
        """The configured tags around reasoning and answer."""
        return ReasoningTags.from_config(self.config)

    @property
    def trainable(self) -> frozenset[str]:
        """Keys of the weights that training changes."""
        frozen = ("audio_tower.",) if self.config.freeze_audio_encoder_params else ()
        return frozenset(key for key in self.table if not key.startswith(frozen))

    @property
    def devices(self) -> str:
        """Number and kind, e.g. "4 x TPU v4"."""
        return f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"


def create_session(config: Config) -> Session:
    """Build a configuration's model on all devices present."""
    if config.jax_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(config.jax_cache_dir).expanduser()))
    spec = thinker_spec(config)
    tokenizer = load_tokenizer(config.tokenizer_path)
    special = tokenizer.special_tokens(config.decoder_block, config.vocab_size)
    return Session(config, create_mesh(config), spec, thinker_table(spec), tokenizer, special)
