"""The demonstration: synthesise speech, warm up a tiny model by SFT, run GRPO on it, compare word error rates.

    python scripts/demo.py [FOLDER] [--seed N]

Everything lies in FOLDER (`demo` by default). A second call goes on where the first one stopped.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.run_folder import RunFolder

CLIPS = 2500


def audio_grpo(*arguments: str) -> None:
    """Run a verb as a user would."""
    print(f"\n$ audio-grpo {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "audio_grpo", *arguments], check=True)


def main() -> None:
    """Run all stages and print the three corpus word error rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    data, name = options.folder / f"speech-{options.seed}", f"seed-{options.seed}"
    if not data.exists():
        audio_grpo("data", "synthesize", str(data), "--count", str(CLIPS), "--seed", str(options.seed))
    keys = [
        f"run_name={name}",
        f"base_output_directory={options.folder}",
        f"seed={options.seed}",
        f"grain_train_files={data / 'train'}",
        f"grain_eval_files={data / 'test'}",
    ]
    audio_grpo("sft", "tiny-sft", *keys)
    audio_grpo("train", "tiny", *keys)
    run = RunFolder.open(options.folder / name)
    rates = {record["stage"]: record["wer"] for record in JsonLinesFile(run.evaluations_path).read().records}
    print("\nWord error rate on held-out speakers")
    print(f"  random weights      {rates['start']:8.2%}")
    print(f"  after SFT           {rates['sft']:8.2%}")
    print(f"  after GRPO          {rates['grpo']:8.2%}")
    if rates["grpo"] < rates["sft"]:
        print(f"GRPO lowered it by {(rates['sft'] - rates['grpo']) / rates['sft']:.1%}.")
    else:
        print("GRPO did not lower it in this run.")
    print(f"Report: {run.report_path}\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
