"""What is measured: each section asks both sides by turns and gives plain data for JSON."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from reference_work import Work
from worker import Side

ROOT = Path(__file__).parent.parent
OURS = ROOT / ".venv" / "bin" / "python"
PEER = ROOT / ".parity" / "bin" / "python"

SKEWED = {"tokens": 128}
"""With a mean of 32."""

COMPILED = ("reference", "qwen3-asr-0.6b v4-2")
"""Models whose programs' memory is asked for: the reference work's thinker here, or a preset and a TPU."""

SMALL_VOCAB = 128
"""Of programs whose memory is that of all but the vocabulary."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all sections share."""

    model: str
    """Folder of the random thinker."""
    runs: int
    work: Work
    """The reference work, or a smaller one to try the benchmarks with."""


def rollouts(setting: Setting) -> list[dict[str, Any]]:
    """Ours against transformers' `generate`."""
    work = setting.work
    cases = {
        "reference work": work,
        "one completion for each prompt": replace(work, generations=1),
        "clips of 30 s": replace(work, seconds=30.0),
        "skewed lengths": replace(work, **SKEWED, lengths="limits"),
        "real end of sequence": replace(work, **SKEWED, lengths="stops"),
    }
    with Side(OURS, "ours.py") as ours, Side(PEER, "peer.py") as peer:
        return [{"name": name, **_compared(setting, ours, peer, case)} for name, case in cases.items()]


def _compared(setting: Setting, ours: Side, peer: Side, work: Work) -> dict[str, Any]:
    sample, generate = _asking(ours, work), _asking(peer, work, folder=setting.model)
    first = sample(0)["seconds"]
    _asking(peer, replace(work, tokens=2, lengths="equal"), folder=setting.model)(0)
    rounds = [(sample(seed), generate(seed)) for seed in range(1, setting.runs + 1)]
    told = [_rate([pair[side] for pair in rounds]) for side in (0, 1)]
    return {
        "work": asdict(work),
        "ours": {**told[0], "first_seconds": first},
        "peer": told[1],
        "ratio": told[0]["tokens_per_second"] / told[1]["tokens_per_second"],
    }


def _asking(side: Side, work: Work, **others: Any) -> Callable[[int], dict[str, Any]]:
    return lambda seed: side.ask("rollout", work=asdict(work), seed=seed, **others)


def _rate(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and all runs. Rates are what is compared: lengths that are drawn differ from run to run."""
    return {
        "seconds": median(answer["seconds"] for answer in answers),
        "tokens_per_second": median(answer["tokens"] / answer["seconds"] for answer in answers),
        "runs": answers,
    }


def _ours_alone(setting: Setting, ours: Side, work: Work) -> dict[str, Any]:
    sample = _asking(ours, work)
    first = sample(0)["seconds"]
    return {
        "work": asdict(work),
        **_rate([sample(seed) for seed in range(1, setting.runs + 1)]),
        "first_seconds": first,
    }


def scaling(setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Ours over completions for each prompt, length of the clips, and slots."""
    work = setting.work
    curves = {
        "generations": [replace(work, generations=count) for count in (1, 2, 4, 8, 16)],
        "seconds": [replace(work, seconds=length) for length in (1.0, 5.0, 15.0, 30.0)],
        "slots": [replace(work, slots=count) for count in (8, 16, 32, 64)],
    }
    with Side(OURS, "ours.py") as ours:
        return {name: [_ours_alone(setting, ours, work) for work in works] for name, works in curves.items()}


def decode_step(setting: Setting) -> dict[str, Any]:
    """Seconds of a decode step, from works that differ in their tokens only, and of its matrix products."""
    long = setting.work
    short = replace(long, tokens=long.tokens // 4)
    with Side(OURS, "ours.py") as ours, Side(PEER, "peer.py") as peer:

        def steps(side: Side, seed: int, **others: Any) -> float:
            whole, part = (_asking(side, work, **others)(seed)["seconds"] for work in (long, short))
            return (whole - part) / (long.tokens - short.tokens)

        steps(ours, 0)
        rounds = [
            {
                "ours": steps(ours, seed),
                "peer": steps(peer, seed, folder=setting.model),
                "matmuls": ours.ask("matmuls", rows=long.completions),
            }
            for seed in range(1, setting.runs + 1)
        ]
    sides = {side: {"seconds": median(told[side] for told in rounds)} for side in ("ours", "peer")}
    products = {name: median(told["matmuls"][name] for told in rounds) for name in rounds[0]["matmuls"]}
    ratio = sides["ours"]["seconds"] / sum(products.values())
    return {**sides, "matmul_seconds": products, "ratio": ratio, "runs": rounds}


def slots(setting: Setting) -> list[dict[str, Any]]:
    """Share of slot steps that gave a token which was wanted, lengths skewed."""
    many = replace(setting.work, prompts=8 * setting.work.prompts, seconds=1.0, **SKEWED)
    with Side(OURS, "ours.py") as ours:
        return [_ours_alone(setting, ours, replace(many, lengths=kind)) for kind in ("limits", "stops")]


def learner(setting: Setting) -> list[dict[str, Any]]:
    """Reference scoring and policy update, in processes of their own; ours samples first."""
    prompts = ({"seconds": 5.0, "text_tokens": 64}, {"seconds": 30.0, "text_tokens": 60})
    works = [replace(setting.work, generations=count, **sizes) for sizes in prompts for count in (2, 4, 8, 16)]
    return [_learned(setting, work) for work in works]


def _learned(setting: Setting, work: Work) -> dict[str, Any]:
    given = {"work": asdict(work)}
    with ExitStack() as stack:
        ours = stack.enter_context(Side(OURS, "ours_iteration.py", **given))
        peer = stack.enter_context(Side(PEER, "peer_iteration.py", **given, folder=setting.model))
        first = [ours.ask("iterate", seed=0), peer.ask("learn")]
        _check_alike(first, "gradient_norm", 1e-3)
        rounds = [[side.ask("learn") for side in (ours, peer)] for _ in range(setting.runs)]
    told = [_learning(first[side], [answers[side] for answers in rounds]) for side in (0, 1)]
    return {**given, "ours": told[0], "peer": told[1], "ratio": told[1]["seconds"] / told[0]["seconds"]}


def _check_alike(answers: list[dict[str, Any]], name: str, tolerance: float) -> None:
    ours, peer = (answer[name] for answer in answers)
    if abs(ours / peer - 1) > tolerance:
        raise RuntimeError(f"The sides do not do the same work: {name} is {ours:.6g} of ours, {peer:.6g} of the peer.")


def _learning(first: dict[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seconds": median(answer["scoring"] + answer["update"] for answer in answers),
        "peak": max(answer["peaks"]["update"] for answer in (first, *answers)),
        "first": first,
        "runs": answers,
    }


def iteration(setting: Setting) -> dict[str, Any]:
    """Whole iterations on prompts of text, against TRL's own trainer."""
    decoder = f"{setting.model}-decoder"
    with Side(PEER, "peer.py") as peer:
        peer.ask("publish_decoder", folder=setting.model, out=decoder)
    given = {"work": asdict(setting.work.as_text)}
    with ExitStack() as stack:
        ours = stack.enter_context(Side(OURS, "ours_iteration.py", **given))
        first = [_iterated(ours, 0)]
        trl = stack.enter_context(Side(PEER, "peer_trl.py", **given, folder=decoder, steps=1 + setting.runs))
        first += [trl.ask("step")]
        _check_alike(first, "entropy", 1e-2)  # of their own samples
        rounds = [(_iterated(ours, seed), trl.ask("step")) for seed in range(1, setting.runs + 1)]
    told = [_iterations(first[side], [answers[side] for answers in rounds]) for side in (0, 1)]
    return {**given, "ours": told[0], "peer": told[1], "ratio": told[1]["seconds"] / told[0]["seconds"]}


def _iterated(ours: Side, seed: int) -> dict[str, Any]:
    told = ours.ask("iterate", seed=seed, rewarded=True)
    return {**told, "peak": told["peaks"]["update"]}


def _iterations(first: dict[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any]:
    seconds, peak = median(answer["seconds"] for answer in answers), max(x["peak"] for x in (first, *answers))
    return {"seconds": seconds, "peak": peak, "first": first, "runs": answers}


def memory(setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Temporaries of the learner's programs over completion tokens, with the models' vocabularies and a small one."""
    works = [replace(setting.work, prompts=max(1, setting.work.prompts * n // 4)) for n in (1, 4, 16, 64)]
    with Side(OURS, "ours_compiled.py") as ours:

        def case(model: str, work: Work) -> dict[str, Any]:
            asked = {"model": model, "work": asdict(work)}
            return {**ours.ask("temporaries", **asked), "small": ours.ask("temporaries", **asked, vocab=SMALL_VOCAB)}

        return {model: [case(model, work) for work in works] for model in COMPILED}


SECTIONS: dict[str, Callable[[Setting], Any]] = {
    "rollouts": rollouts,
    "decode step": decode_step,
    "slots": slots,
    "scaling": scaling,
    "learner": learner,
    "iteration": iteration,
    "memory": memory,
}
