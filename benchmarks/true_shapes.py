"""Checkpoints of true shapes, random weights: made, read, used, written and read again, with seconds and memory.

    python benchmarks/true_shapes.py FOLDER [--audio clip.wav] [--omni-layers 4]

Stages run in processes of their own, one after another. "beyond" is the peak of anonymous memory above the device
arrays themselves, copies on several devices included; pages of memory-mapped files can be dropped at any time and do
not count.
"""

import argparse
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30


def make(folder: Path, preset: str, overrides: list[str]) -> dict[str, Any]:
    """Write a random bfloat16 checkpoint of a model preset's shapes."""
    import jax
    import jax.numpy as jnp

    from audio_grpo.config import load_config
    from audio_grpo.model.checkpoint import create_published
    from audio_grpo.model.spec import thinker_spec
    from audio_grpo.model.table import initialize
    from audio_grpo.model.thinker import thinker_table
    from audio_grpo.text import family_special_tokens

    config = load_config(preset, overrides)
    spec = thinker_spec(config)
    weights = {}
    for key, weight in thinker_table(spec).items():  # one by one: float32 noise of all of them would not fit
        weights |= initialize({key: weight}, jax.random.key(0), jnp.bfloat16)
    special = family_special_tokens(config.decoder_block, config.vocab_size)
    create_published(weights, spec, folder, family=config.decoder_block, special=special)
    return {"parameters": sum(x.size for x in weights.values())}


def read(folder: Path, devices: int, axis: str) -> dict[str, Any]:
    """Read a checkpoint in bfloat16 over `devices` devices along one mesh axis; a checksum tells what was read."""
    import jax
    import jax.numpy as jnp

    weights, _, _ = _read(folder, devices, axis)
    sums = jax.jit(lambda w: {key: jnp.abs(value.astype(jnp.float32)).sum() for key, value in w.items()})(weights)
    return {"bytes": _device_bytes(weights), "checksum": float(sum(jax.tree.leaves(sums)))}


def transcribe(folder: Path, audio: str) -> dict[str, Any]:
    """Transcribe a clip as the verb does, in float32."""
    from audio_grpo import inference

    model = inference.open_checkpoint(str(folder))
    transcript = next(inference.transcribe(model, [audio], language="English"))
    told = {"clip_seconds": transcript.audio_seconds, "tokens": len(transcript.token_ids)}
    return {"bytes": _device_bytes(model.weights), **told}


def write(folder: Path, out: Path) -> dict[str, Any]:
    """Read a checkpoint and write it again, every weight of the model anew."""
    from audio_grpo.model.checkpoint import write_published

    weights, table, _ = _read(folder, 1, "fsdp")
    write_published(weights, table, out, source=folder, changed=frozenset(table))
    return {"bytes": _device_bytes(weights)}


def _device_bytes(weights: dict[str, Any]) -> int:
    return sum(shard.data.nbytes for x in weights.values() for shard in x.addressable_shards)


def _read(folder: Path, devices: int, axis: str) -> Any:
    import jax
    import jax.numpy as jnp

    from audio_grpo.config import Config
    from audio_grpo.model.checkpoint import read_published, spec_from_published
    from audio_grpo.model.spec import thinker_spec
    from audio_grpo.model.thinker import thinker_table
    from audio_grpo.parallel.mesh import create_mesh

    parallelism = {"ici_fsdp_parallelism": 1} | {f"ici_{axis}_parallelism": devices}
    config = Config.model_validate({**spec_from_published(folder).settings, **parallelism})
    table = thinker_table(thinker_spec(config))
    mesh = create_mesh(config, jax.devices()[:devices])
    return read_published(folder, table, mesh, jnp.dtype("bfloat16")), table, config


def measured(stage: Callable[..., dict[str, Any]], *arguments: Any, devices: int = 1) -> dict[str, Any]:
    """Run a stage in a fresh process; adds seconds and peak anonymous memory."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    process = context.Process(target=_run, args=(results, stage, arguments))
    process.start()
    result = results.get()
    process.join()
    if "error" in result:
        raise RuntimeError(result["error"])
    return result


def _run(results: Any, stage: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    peak, stop = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, stop))
    watcher.start()
    started = time.perf_counter()
    try:
        result = stage(*arguments)
    except Exception as error:
        results.put({"error": repr(error)})
        raise
    finally:
        stop.set()
        watcher.join()
    result |= {"seconds": round(time.perf_counter() - started, 1), "peak_gib": round(peak[0] / GIB, 2)}
    if "bytes" in result:
        result["beyond_gib"] = round((peak[0] - result["bytes"]) / GIB, 2)
    results.put(result)


def _watch(peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.02):
        lines = Path("/proc/self/status").read_text().splitlines()
        anonymous = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        peak[0] = max(peak[0], anonymous * 1024)


def main() -> None:
    """Run all stages and print a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--audio", help="A clip to transcribe with Qwen3-ASR-0.6B's shapes.")
    parser.add_argument("--omni-layers", type=int, default=4, help="Decoder layers of the Omni-shaped checkpoint.")
    options = parser.parse_args()

    def tell(name: str, result: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps({"stage": name, **result}), flush=True)
        return result

    options.folder.mkdir(parents=True, exist_ok=True)
    asr, again, omni = (options.folder / name for name in ("asr", "asr-again", "omni"))
    tell("make Qwen3-ASR-0.6B", measured(make, asr, "qwen3-asr-0.6b", []))
    first = tell("read it", measured(read, asr, 1, "fsdp"))
    if options.audio:
        tell("transcribe with it", measured(transcribe, asr, options.audio))
    tell("write it anew", measured(write, asr, again))
    second = tell("read that", measured(read, again, 1, "fsdp"))
    if first["checksum"] != second["checksum"]:
        raise RuntimeError(f"The checkpoint changed on its way: {first['checksum']} and {second['checksum']}.")
    layers = [f"num_decoder_layers={options.omni_layers}", "num_experts=128"]
    tell(f"make Omni, {options.omni_layers} layers", measured(make, omni, "qwen3-omni-30b-a3b", layers))
    for axis in ("fsdp", "expert"):
        tell(f"read it over 4 devices, {axis}", measured(read, omni, 4, axis, devices=4))


if __name__ == "__main__":
    main()
