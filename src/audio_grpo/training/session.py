"""What every verb that runs the model stands on: mesh, sizes, weight table, tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.model.audio_tower import PREFIX
from audio_grpo.model.lora import A, lora_table
from audio_grpo.model.spec import ThinkerSpec, resolve_dtype, thinker_spec
from audio_grpo.model.table import Table, sharding_of
from audio_grpo.model.thinker import thinker_table
from audio_grpo.parallel.mesh import create_mesh
from audio_grpo.parallel.roles import create_roles
from audio_grpo.rollout.clip_store import ClipStore
from audio_grpo.text import ReasoningTags, Tokenizer, load_tokenizer
from audio_grpo.training.freezing import frozen_weights
from audio_grpo.types import SpecialTokens


@dataclass(frozen=True)
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
    sampler: "Session | None" = None
    """The same on the devices that only sample; None where there are none, so that all that learn sample too."""

    @property
    def table(self) -> Table:
        """All weights."""
        return {**self.base, **self.adapters}

    @property
    def weight_dtype(self) -> jnp.dtype:
        """Of stored weights."""
        return jnp.dtype(resolve_dtype(self.config.weight_dtype, self.mesh))

    @property
    def reference_dtype(self) -> jnp.dtype:
        """Of the reference's own weights."""
        given = self.config.reference_weight_dtype
        return self.weight_dtype if given is None else jnp.dtype(given)

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

    @cached_property
    def trainable(self) -> frozenset[str]:
        """Keys of the weights that training changes: the adapters, or all that is not frozen."""
        return frozenset(self.adapters or self.base.keys() - frozen_weights(self.config, self.base))

    @property
    def tower_learns(self) -> bool:
        """Whether any weight of the audio tower changes, so that clips must be heard within each update."""
        return any(key.startswith(PREFIX) for key in self.trainable)

    @cached_property
    def clip_store(self) -> ClipStore | None:
        """Where audio embeddings are kept; None where the tower learns, or several processes share the clips."""
        config = self.config
        if self.tower_learns or not config.audio_store_gib or jax.process_count() > 1:
            return None
        folder = None if config.audio_store_path is None else Path(config.audio_store_path).expanduser()
        return ClipStore(int(config.audio_store_gib * (1 << 30)), folder)

    @property
    def devices(self) -> str:
        """Number and kind, e.g. "4 x TPU v4" or "2 x TPU v4 learn, 2 x TPU v4 sample"."""
        own = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        return own if self.sampler is None else f"{own} learn, {self.sampler.devices} sample"


def create_session(config: Config, devices: Sequence[Any] | None = None) -> Session:
    """Build a configuration's model on given devices, all that are present by default."""
    return _session(config, create_mesh(config, devices))


def create_grpo_session(config: Config, devices: Sequence[Any] | None = None) -> Session:
    """As `create_session`, but without the devices that only sample, which are its `sampler`'s.

    Raises:
        UserError: the devices can not be parted, or the weights not be cut over those that sample.
    """
    roles = create_roles(config, devices)
    session = _session(config, roles.learners)
    if roles.samplers is None:
        return session
    sampler = replace(session, mesh=roles.samplers, spec=thinker_spec(config, roles.samplers))
    _check_can_be_cut(sampler)
    return replace(session, sampler=sampler)


def _check_can_be_cut(sampler: Session) -> None:
    try:
        for key, weight in sampler.table.items():
            sharding_of(sampler.mesh, key, weight)
    except UserError as error:
        raise UserError(
            "The weights can not be cut over the devices of a replica that samples: change "
            "inference_devices_per_replica, which is to them what ici_* keys are to the devices that learn. "
            f"{error}"
        ) from error


def _session(config: Config, mesh: Mesh) -> Session:
    if config.jax_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(config.jax_cache_dir).expanduser()))
    spec = thinker_spec(config, mesh)
    tokenizer = load_tokenizer(config.tokenizer_path)
    special = tokenizer.special_tokens(config.decoder_block, config.vocab_size)
    base = thinker_table(spec)
    frozen = frozen_weights(config, base)
    return Session(config, mesh, spec, base, _adapters(config, base, frozen), tokenizer, special)


def _adapters(config: Config, base: Table, frozen: Mapping[str, str]) -> Table:
    if not config.lora_rank:
        return {}
    adapters = lora_table(base, rank=config.lora_rank, targets=config.lora_target_modules)
    for adapted, key in frozen.items():
        if adapted.replace(".weight", A) in adapters:
            raise UserError(
                f"lora_target_modules {config.lora_target_modules} adapts {adapted}, but {key} freezes it: change one "
                "of the two."
            )
    return adapters
