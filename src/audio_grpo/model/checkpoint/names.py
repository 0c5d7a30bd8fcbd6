"""Published tensor names in all their spellings, and the one that the weight table uses."""

from audio_grpo.model.checkpoint.tensor_file import StoredTensor

_SPELLINGS = (
    ("thinker.", ""),
    ("model.language_model.", "model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.visual.", "visual."),
    ("model.multi_modal_projector.linear_", "audio_tower.proj"),
)
"""Prefixes, and what the table has in their place: original files, then the `-hf` conversions."""

_CARRIED = ("visual.", "talker.", "code2wav.")
_FUSED_GATE_UP, _FUSED_DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def table_name(name: str) -> str:
    """A published name as the table spells it, e.g. `audio_tower.proj1.bias`."""
    for prefix, replacement in _SPELLINGS:
        if name.startswith(prefix):
            name = replacement + name[len(prefix) :]
    return name


def is_carried(name: str) -> bool:
    """True for the table name of a part that this project does not run: it passes from checkpoint to checkpoint."""
    return name.startswith(_CARRIED)


def single_tensors(stored: StoredTensor) -> list[StoredTensor]:
    """The tensor under its table name, or the experts' tensors that it fuses, in the order of its bytes.

    Fused: `gate_up_proj` [E, 2F, D], the gate's rows first, and `down_proj` [E, D, F].
    """
    name, shape = table_name(stored.name), stored.shape
    if len(shape) == 3 and name.endswith(_FUSED_GATE_UP) and shape[1] % 2 == 0:
        prefix = name.removesuffix("gate_up_proj")
        names = [f"{prefix}{e}.{part}_proj.weight" for e in range(shape[0]) for part in ("gate", "up")]
        return stored.split(names, (shape[1] // 2, shape[2]))
    if len(shape) == 3 and name.endswith(_FUSED_DOWN):
        names = [f"{name.removesuffix('down_proj')}{e}.down_proj.weight" for e in range(shape[0])]
        return stored.split(names, shape[1:])
    return stored.split([name], shape)
