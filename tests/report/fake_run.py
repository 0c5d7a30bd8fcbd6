"""A run folder as a real run would write it, without the run."""

from pathlib import Path

import numpy as np
import yaml

from audio_grpo.training.evaluation_report import ErrorRates, EvaluationReport, Utterance
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.telemetry import CompletionsWriter, MetricsWriter, SampledCompletion

CONFIG = {
    "run_name": "speech-demo",
    "model_name": "tiny",
    "grain_train_files": "demo/speech/train",
    "grain_eval_files": "demo/speech/test",
    "template": "transcript",
    "text_normalizer": "basic",
    "reward_functions": ["asr_wer_reward", "asr_format_reward"],
    "num_generations": 8,
    "learning_rate": 1e-5,
    "grpo_beta": 0.04,
    "steps": 60,
    "seed": 0,
    "load_parameters_path": None,
}

TRANSCRIPTS = [
    (
        "speaker1/utt_00003",
        "English",
        "seven blue lamps stand in the narrow hall",
        "seven blue lamp stand in a the hall",
    ),
    ("speaker4/utt_00017", "Arabic", "ذهب الولد إلى المدرسة في الصباح الباكر", "ذهب ولد إلى المدرسة الصباح الباكر جدا"),
]


def write_fake_run(base: Path, *, steps: int = 60) -> RunFolder:
    """Everything a finished run leaves."""
    run = begin_fake_run(base)
    run.write_environment("1 × CPU")
    write_metrics(run, steps)
    write_completions(run, steps)
    for report in evaluations(steps):
        run.write_evaluation(report)
    return run


def begin_fake_run(base: Path) -> RunFolder:
    """A run that has written nothing but its configuration."""
    run = RunFolder.create(str(base), "speech-demo")
    run.config_path.write_text(yaml.safe_dump(CONFIG))
    return run


def write_metrics(run: RunFolder, steps: int) -> None:
    noise = np.random.default_rng(0)
    with MetricsWriter(run, "sft", tensorboard=False) as sft:
        for step in range(1, steps + 1):
            sft.write(step, {"loss": 4 * np.exp(-step / 20) + 0.1 * noise.random(), "step_time": 0.4})
    with MetricsWriter(run, "grpo", tensorboard=False) as grpo:
        for step in range(1, steps + 1):
            grpo.write(step, _grpo_metrics(step / steps, step, noise))


def _grpo_metrics(done: float, step: int, noise: np.random.Generator) -> dict[str, float]:
    wer_reward = -0.8 + 0.6 * done + 0.2 * noise.standard_normal()
    format_reward = 2.4 + 0.5 * done
    mean_length = 14 - 3 * done + noise.standard_normal()
    return {
        "loss": 0.002 * noise.standard_normal(),
        "reward": wer_reward + format_reward,
        "reward_std": 0.6 - 0.3 * done + 0.05 * noise.random(),
        "frac_reward_zero_std": 0.1 + 0.3 * done + 0.05 * noise.random(),
        "rewards/asr_wer_reward/mean": wer_reward,
        "rewards/asr_wer_reward/std": 0.5 - 0.2 * done,
        "rewards/asr_format_reward/mean": format_reward,
        "rewards/asr_format_reward/std": 0.2,
        "wer": 0.6 - 0.35 * done + 0.05 * noise.random(),
        "errors/substitution_rate": 0.4 - 0.2 * done,
        "errors/deletion_rate": 0.1 - 0.05 * done,
        "errors/insertion_rate": 0.1 - 0.1 * done,
        "answers/wrong_script_rate": 0.05 - 0.05 * done,
        "kl": float("nan") if step in (20, 21, 30) else 0.0004 * step + 0.002 * noise.random(),
        "entropy": 1.2 - 0.7 * done + 0.05 * noise.random(),
        "grad_norm": 0.8 + 0.4 * noise.random() + (4 if step == 41 else 0),
        "grad_norm/attention": 0.5 + 0.2 * noise.random(),
        **({"skipped_updates/rewards": 1.0} if step == 20 else {}),
        "learning_rate": 1e-5 * min(1.0, step / 6),
        "clip_ratio/region_mean": 0.0,
        "completions/mean_length": mean_length,
        "completions/min_length": mean_length - 6,
        "completions/max_length": mean_length + 11,
        "completions/clipped_ratio": max(0.0, 0.2 - 0.3 * done + 0.05 * noise.random()),
        "sampling/sampling_logp_difference/mean": 2e-6 + 1e-6 * noise.random(),
        "sampling/sampling_logp_difference/max": 3e-5 + 1e-5 * noise.random(),
        "step_time": 1.9 + 0.2 * noise.random() + (14 if step == 1 else 0),
        "tokens_per_second": 1250 + 80 * noise.standard_normal(),
        "num_tokens": 12_300.0 * step,
    }


def write_completions(run: RunFolder, steps: int) -> None:
    writer = CompletionsWriter(run)
    seconds = np.arange(24_000) / 16_000
    for step in range(1, steps + 1):
        for place, (clip, language, reference, wrong) in enumerate(TRANSCRIPTS):
            samples = (0.2 * np.sin(2 * np.pi * 220 * (place + 1) * seconds)).astype(np.float32)
            for answer, wer, reward in ((reference, 0.0, 4.0), (wrong, 0.5, 0.5), (None, 1.0, -2.0)):
                sampled = SampledCompletion(
                    step=step,
                    clip_id=clip,
                    language=language,
                    reference=reference,
                    completion=f"<answer>{answer}</answer>" if answer else "<answer>seven seven seven seven seven",
                    hypothesis=answer,
                    wer=wer,
                    rewards={"asr_wer_reward": reward, "asr_format_reward": 3.0 if answer else 0.0},
                    reward=reward + (3.0 if answer else 0.0),
                    advantage=reward / 3 - 0.4,
                    length=12 if answer else 32,
                    finish_reason="stop" if answer else "length",
                )
                writer.write(sampled, samples)


def evaluations(steps: int) -> list[EvaluationReport]:
    return [
        _evaluation("before sft", 0, 0.98),
        _evaluation("sft", steps, 0.42),
        _evaluation("grpo", steps // 2, 0.38),
        _evaluation("grpo", steps, 0.335),
    ]


def _evaluation(stage: str, step: int, wer: float) -> EvaluationReport:
    return EvaluationReport(
        stage=stage,
        step=step,
        text_normalizer="basic",
        text_normalizer_version="1",
        rates=rates(wer, 48),
        by_language={"Arabic": rates(wer * 1.2, 20), "English": rates(wer * 0.85, 28)},
        by_duration={"0-2 s": rates(wer * 0.9, 18), "2-5 s": rates(wer * 1.1, 30)},
        utterances=tuple(
            Utterance(id=f"{clip}-{copy}", reference=reference, hypothesis=heard, wer=wrong)
            for copy in range(10)
            for clip, _, reference, hypothesis in TRANSCRIPTS
            for heard, wrong in [(reference, 0.0) if copy % 2 else (hypothesis, 0.5)]
        ),
    )


def rates(wer: float, clips: int) -> ErrorRates:
    edits = round(wer * clips * 7)
    return ErrorRates(
        clips=clips,
        reference_words=clips * 7,
        substitutions=edits - edits // 3 - edits // 5,
        deletions=edits // 3,
        insertions=edits // 5,
        reference_characters=clips * 40,
        cer_edits=round(wer * clips * 16),
    )
