"""The results as a page in Markdown."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

GIB, MIB = 2**30, 2**20
Section = Any
Rows = Iterable[Sequence[str]]

PREFACE = """# Benchmarks

`make bench` writes this page and `benchmarks.json`, which has every run. The model is a random Qwen3-Omni thinker in
float32: 2 layers, width 256, 4 heads, 2 key/value heads of width 64, 8 experts of width 256 of which 2 are taken,
vocabulary 152,064; a tower of 2 layers, width 256, ffn 1024. The reference work is 8 prompts × 8 completions × 64
tokens, clips of 5 s, prompts of 129 tokens, temperature 0.9. The peer is transformers' implementation of the same model
with the same weights in torch, with its defaults and sdpa attention, in an environment of its own. The sides take turns
on the same two cores; figures are medians. What is compiled is compiled before: "first call" has that in it."""

ABOUT = {
    "rollouts": """## Rollouts

The peer is `generate`, which hears a clip once for every completion and samples all completions together until the
longest has ended; ours reports each token's log-probability besides. Tokens are those that were asked for, up to the
limit or the stop token. Skewed lengths are geometric with a mean of 32, at most 128: by a limit for each prompt, or by
a stop token that comes by chance, for which a 32nd of the vocabulary stops.""",
    "decode step": """## A decode step

Seconds of one more token in every slot of the reference work, told from works of 64 and of 16 tokens, beside what the
step's matrix products cost alone, and beside the peer's.""",
    "slots": """## Use of slots

Share of slot steps (decode steps × slots) that gave a token which was wanted; 64 prompts × 8 completions of skewed
lengths.""",
    "scaling": """## Scaling

Ours, the reference work with one size changed.

![Tokens a second over completions for each prompt, length of the clips, and slots](benchmarks-scaling.svg)""",
    "learner": """## Learner

Reference scoring and policy update (forward, backward, AdamW on all weights but the tower's) of given completions of 64
tokens, 8 prompts. The peer hears each clip once, repeats its prompt for every completion and has logits of completion
tokens only; that the sides' gradient norms agree is checked. Memory is the most that a process has had resident: ours
in a whole iteration, rollout and compilation included, the peer's without a rollout, since `generate` makes logits of
whole prompts, 35 GB for 16 completions after 450 tokens.""",
    "iteration": """## A whole iteration, against TRL

Sampling, a reward that costs nothing, reference scoring and an update of all weights, of what was sampled. The peer is
TRL's `GRPOTrainer`, whose steps wait for their turn: it samples with transformers' `generate` and learns from 16
completions at a time, without gradient checkpointing. It has no audio, so prompts are 129 tokens of text and its model
is the decoder alone, with the same weights; on a CPU its head scores prompts too.""",
    "memory": """## Memory over completion tokens

MiB of temporaries, which is what a program needs beside its arguments and results, as the compiler tells it: nothing is
run. Programs take all groups of 8 completions of 64 tokens, after prompts of 129, in one pass. Beside each program
stands the same one with a vocabulary of 128, which is all but the vocabulary: what the layers need. Hidden states are
one for each completion token; all logits are in float32.""",
}


def page(sections: dict[str, Section]) -> str:
    """All sections that there are, each with where and when it was measured."""
    parts = [PREFACE]
    for name, section in sections.items():
        head, rows = TABLES[name](section["results"])
        parts += [ABOUT[name], "\n".join(_table(head, rows)), _footnote(section)]
    return "\n\n".join(parts) + "\n"


def _rollouts(results: Any) -> tuple[Sequence[str], Rows]:
    head = ("", "ours, s", "tokens/s", "peer, s", "tokens/s", "times faster", "first call, s")
    return head, (
        (
            case["name"],
            _number(case["ours"]["seconds"]),
            _number(case["ours"]["tokens_per_second"]),
            _number(case["peer"]["seconds"]),
            _number(case["peer"]["tokens_per_second"]),
            f"**{case['ratio']:.1f}**",
            _number(case["ours"]["first_seconds"]),
        )
        for case in results
    )


def _decode_step(results: Any) -> tuple[Sequence[str], Rows]:
    products = results["matmul_seconds"]
    floor = sum(products.values())

    def rows() -> Iterator[Sequence[str]]:
        for name, seconds in products.items():
            yield name, _milliseconds(seconds), ""
        yield "all products", _milliseconds(floor), "1"
        for side in ("ours", "peer"):
            step = results[side]["seconds"]
            yield f"a decode step, {side}", _milliseconds(step), f"**{step / floor:.2f}**"

    return ("", "ms", "of all products"), rows()


def _slots(results: Any) -> tuple[Sequence[str], Rows]:
    names = {"limits": "a limit for each prompt", "stops": "stop tokens"}
    return ("lengths", "slots", "used", "tokens/s"), (
        (
            names[case["work"]["lengths"]],
            str(case["runs"][0]["stats"]["slots"]),
            f"**{_middle(run['stats']['utilisation'] for run in case['runs']):.2f}**",
            _number(case["tokens_per_second"]),
        )
        for case in results
    )


def _scaling(results: Any) -> tuple[Sequence[str], Rows]:
    return ("", "", "seconds", "tokens/s"), (
        (SWEPT[name], f"{case['work'][name]:g}", _number(case["seconds"]), _number(case["tokens_per_second"]))
        for name, cases in results.items()
        for case in cases
    )


SWEPT = {"generations": "completions for each prompt", "seconds": "seconds of each clip", "slots": "slots"}


def _learner(results: Any) -> tuple[Sequence[str], Rows]:
    head = ("prompt", "completions for each", "ours, s", "peer, s", "times faster", "ours, GiB", "peer, GiB")

    def row(case: Any) -> Sequence[str]:
        work, ours, peer = case["work"], case["ours"], case["peer"]
        return (
            f"{round(13 * work['seconds']) + work['text_tokens']} tokens",
            str(work["generations"]),
            _number(ours["seconds"]),
            _number(peer["seconds"]),
            f"**{case['ratio']:.1f}**",
            f"{ours['peak'] / GIB:.2f}",
            f"{peer['peak'] / GIB:.2f}",
        )

    return head, map(row, results)


def _iteration(results: Any) -> tuple[Sequence[str], Rows]:
    ours, trl = results["ours"], results["peer"]

    def row(name: str, side: Any) -> Sequence[str]:
        return (
            name,
            _number(side["seconds"]),
            _number(side["first"]["seconds"]),
            f"{side['peak'] / GIB:.2f}",
            f"**{trl['seconds'] / side['seconds']:.1f}**",
        )

    head = ("", "an iteration, s", "the first, s", "memory, GiB", "times faster")
    return head, (row("ours", ours), row("TRL's", trl))


def _memory(results: Any) -> tuple[Sequence[str], Rows]:
    small = f"vocabulary of {results['reference'][0]['small']['vocab']}"
    head = ("", "completion tokens", "hidden states", "scoring", small, "gradients", small, "all logits")

    def row(model: str, case: Any) -> Sequence[str]:
        with_vocabulary = {phase: (case[phase], case["small"][phase]) for phase in ("scoring", "gradients")}
        logits = 4 * case["tokens"] * case["vocab"]
        sizes = (case["hidden"], *with_vocabulary["scoring"], *with_vocabulary["gradients"], logits)
        return (MODELS[model], f"{case['tokens']:,}", *(f"{size / MIB:,.0f}" for size in sizes))

    return head, (row(model, case) for model, cases in results.items() for case in cases)


MODELS = {"reference": "the reference work's, float32, CPU", "qwen3-asr-0.6b v4-2": "Qwen3-ASR-0.6B, bfloat16, TPU v4"}


TABLES: dict[str, Callable[[Any], tuple[Sequence[str], Rows]]] = {
    "rollouts": _rollouts,
    "decode step": _decode_step,
    "slots": _slots,
    "scaling": _scaling,
    "learner": _learner,
    "iteration": _iteration,
    "memory": _memory,
}


def _table(head: Sequence[str], rows: Rows) -> Iterator[str]:
    for cells in (head, ("---", *("---:" for _ in head[1:])), *rows):
        yield f"| {' | '.join(cells)} |"


def _footnote(section: Section) -> str:
    machine, load = section["machine"], section["load"]
    versions = ", ".join(f"{name} {version}" for name, version in section["versions"].items())
    return (
        f"{section['started']}, {section['runs']} runs; {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; load average {load['before']:.1f} before, {load['after']:.1f} after; {versions}."
    )


def _middle(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(seconds: float) -> str:
    return _number(1000 * seconds)
