"""Training checkpoints: what a run needs to go on as if it had never stopped."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.grpo import TrainState


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint's contents."""

    state: TrainState
    data: bytes
    """State of the data iterator."""


class Checkpoints:
    """Checkpoints of one phase of a run; use it in a `with`, which waits for what is still being written."""

    def __init__(self, folder: epath.Path, config: Config) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.max_num_checkpoints_to_keep,
            enable_async_checkpointing=config.async_checkpointing,
            create=True,
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest_step(self) -> int:
        """Step of the newest checkpoint, 0 where there is none."""
        return self._manager.latest_step() or 0

    def save(self, step: int, state: TrainState, data: bytes) -> None:
        """Write a checkpoint after `step` updates: weights apart from the rest, since others read them alone."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardSave(state.trainable),
                training=ocp.args.StandardSave(_rest(state)),
                data=ocp.args.JsonSave(json.loads(data)),
            ),
        )

    def restore(self, like: TrainState) -> Restored:
        """Read the newest checkpoint into the shapes and shardings of `like`, whatever devices wrote it."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        read = self._manager.restore(
            self.latest_step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardRestore(abstract.trainable),
                training=ocp.args.StandardRestore(_rest(abstract)),
                data=ocp.args.JsonRestore(),
            ),
        )
        rest = read["training"]
        state = TrainState(
            step=rest["step"],
            skipped=rest["skipped"],
            trainable=read["weights"],
            master=rest.get("master"),
            optimizer=rest["optimizer"],
        )
        return Restored(state, json.dumps(read["data"]).encode())


def latest_step(folder: epath.Path) -> int:
    """Step of the newest checkpoint below `folder`, 0 where there is none."""
    steps = ocp.path.step.checkpoint_steps(folder.resolve()) if folder.exists() else []
    return max(steps, default=0)


def latest_weights(folder: epath.Path, shardings: Mapping[str, Any], dtype: Any) -> dict[str, Array]:
    """Trained weights of the newest checkpoint below `folder`; empty where there is none."""
    step = latest_step(folder)
    if not step:
        return {}
    with ocp.StandardCheckpointer() as reader:
        item = ocp.path.step.build_step_path(folder.resolve(), ocp.path.step.standard_name_format(), step) / "weights"
        tree: Any = reader.metadata(item).item_metadata
        unknown = sorted(set(tree) - set(shardings))
        if unknown:
            raise UserError(
                f"{folder} has weights that the configuration does not, such as {unknown[0]}: set lora_rank and "
                "lora_target_modules as they were, or merge the adapters with `audio-grpo export` and start from that."
            )
        abstract = {key: jax.ShapeDtypeStruct(tree[key].shape, dtype, sharding=shardings[key]) for key in tree}
        return reader.restore(item, abstract)


def _rest(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "skipped": state.skipped, "optimizer": state.optimizer}
    return rest if state.master is None else {**rest, "master": state.master}
