"""Attention without score arrays, by JAX's Pallas splash attention for TPU.

A prompt and its G completions are packed into one sequence, each part padded to whole blocks:

    | prompt  .. | completion 0 .. | completion 1 .. | …          one part = whole blocks
      T             C                 C

so that a block of scores is either empty (skipped), full, or the one causal triangle that all parts share. The mask is
therefore one block in memory, however long the sequence is. What the padding of parts and prompts hides:

- keys that pad a completion lie after all of its real queries;
- keys that pad a prompt, from `prompt_lengths` on, carry another segment id than everything real.

Padded queries see at least themselves, so what they yield is finite, and means nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from audio_grpo.model.attention import Projected
from audio_grpo.parallel.mesh import BATCH_AXES

_SMALLEST_BLOCK, _LARGEST_BLOCK = 128, 512
"""Positions: the lanes of a TPU register, and what VMEM holds comfortably at a head width of 256."""


def flash_supports(head_width: int) -> bool:
    """Whether the kernels take heads this wide: multiples of 8 up to 256. Below 128 they compute as much as at 128."""
    return head_width % 8 == 0 and head_width <= 256


def causal_attention(x: Projected, *, mesh: Mesh | None = None, interpret: bool = False) -> Float[Array, "S Q H N"]:
    """Each position attends to itself and those before it; scaled by N^−0.5, softmax in float32, differentiable.

    The scale is applied to the queries, in their own precision: the kernel takes none.

    Args:
        x: float32 or bfloat16, of a head width that `flash_supports`.
        mesh: Pallas kernels are not partitioned by the compiler: with a mesh, S is split over `BATCH_AXES` and H and K
            over "tensor", all of which must divide. None: one device.
        interpret: emulate the kernel, slowly, where there is no TPU. For tests.
    """
    spec = PartitionSpec(BATCH_AXES, None, "tensor", None)
    call = partial(_causal_attention, interpret=interpret)
    if mesh is not None:
        call = jax.shard_map(call, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)
    return call(x)


def group_attention(
    prompts: Projected,
    completions: Projected,
    prompt_lengths: Int[Array, "B"],
    *,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H N"], Float[Array, "BG C H N"]]:
    """Attend within B prompts [B, T] and, from G completions of each [B·G, C], to the prompt and causally to itself.

    Completions see their prompt's first `prompt_lengths` positions and no other completion. Rows of prompts from
    `prompt_lengths` on are finite and mean nothing. See `causal_attention` for the rest.
    """
    spec = PartitionSpec(BATCH_AXES, None, "tensor", None)
    call = partial(_group_attention, interpret=interpret)
    if mesh is not None:
        specs = (spec, spec, PartitionSpec(BATCH_AXES))
        call = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=(spec, spec), check_vma=False)
    return call(prompts, completions, prompt_lengths)


def _causal_attention(x: Projected, interpret: bool) -> Float[Array, "S Q H N"]:
    length = x.queries.shape[1]
    block = _block(length)
    padded = jax.tree.map(partial(_pad, block=block), x)
    size = padded.queries.shape[1]
    return _splash(padded, masks.CausalMask((size, size)), None, block, interpret)[:, :length]


def _group_attention(
    prompts: Projected, completions: Projected, prompt_lengths: Int[Array, "B"], interpret: bool
) -> tuple[Float[Array, "B T H N"], Float[Array, "BG C H N"]]:
    groups, prompt_length = prompts.queries.shape[:2]
    rows, completion_length = completions.queries.shape[:2]
    block = _block(completion_length)
    first, rest = (jax.tree.map(partial(_pad, block=block), part) for part in (prompts, completions))
    mask = _GroupMask(first.queries.shape[1], rest.queries.shape[1], rows // groups)

    def pack(prompt: Array, completion: Array) -> Array:
        return jnp.concatenate([prompt, completion.reshape(groups, -1, *completion.shape[2:])], axis=1)

    place = jnp.arange(mask.shape[0])
    padding = (place >= prompt_lengths[:, None]) & (place < mask.prompt)
    attended = _splash(jax.tree.map(pack, first, rest), mask, padding.astype(jnp.int32), block, interpret)
    attended_completions = attended[:, mask.prompt :].reshape(rows, mask.completion, *attended.shape[2:])
    return attended[:, :prompt_length], attended_completions[:, :completion_length]


def _splash(
    x: Projected, mask: masks.Mask, segments: Int[Array, "S Q"] | None, block: int, interpret: bool
) -> Float[Array, "S Q H N"]:
    heads, width = x.queries.shape[2:]
    kernel = _kernel(mask, heads, block, interpret)
    queries, keys, values = (jnp.swapaxes(part, 1, 2) for part in (x.queries * width**-0.5, x.keys, x.values))
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    return jnp.swapaxes(jax.vmap(kernel)(queries, keys, values, ids), 1, 2)


@lru_cache
def _kernel(mask: masks.Mask, heads: int, block: int, interpret: bool) -> Callable[..., Array]:
    """Splash attention of one packed sequence, [heads, positions, N], its mask held as NumPy arrays.

    Separate kernels for dq and dk, dv: the fused one writes a partial dq for each block of keys before it sums them.
    One block size for all, so that the causal triangle is the only partly masked block of each.
    """
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
    return jax.tree.map(np.asarray, kernel)


@dataclass(frozen=True)
class _GroupMask(masks.Mask):
    """Which query sees which key of a packed sequence, in padded lengths; computed for the piece that is asked for."""

    prompt: int
    completion: int
    generations: int

    @property
    def shape(self) -> tuple[int, int]:
        length = self.prompt + self.generations * self.completion
        return length, length

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (np.arange(part.start, part.stop) for part in index)
        same = self._part(queries)[:, None] == self._part(keys)
        return (keys <= queries[:, None]) & (same | (keys < self.prompt))

    def _part(self, place: np.ndarray) -> np.ndarray:
        return (place - self.prompt) // self.completion


def _block(length: int) -> int:
    """The power of two that holds a part, within limits.

    Each block costs a fixed time besides its products, so large ones win until they are longer than a part and compute
    what is masked. Completions of 256 tokens take 256: a prompt of 430 is two blocks, and with 8 completions 27 of the
    100 blocks are visited.
    """
    return min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, 1 << (length - 1).bit_length()))


def _pad(x: Float[Array, "S Q heads N"], block: int) -> Float[Array, "S padded heads N"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
