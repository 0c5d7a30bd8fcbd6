"""Corpus WER and CER of greedy transcriptions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from etils import epath
from jaxtyping import Array

from audio_grpo.config import Config
from audio_grpo.data import evaluation_batches
from audio_grpo.errors import UserError
from audio_grpo.grpo import generate_offline_completions
from audio_grpo.parallel.mesh import batch_shards
from audio_grpo.parallel.processes import is_first, start_processes
from audio_grpo.rewards import EditCounts
from audio_grpo.rollout import OfflineEngine, Sampling, engine_settings
from audio_grpo.text import get_normalizer
from audio_grpo.training.answers import ScoredAnswer, decode_completions, score_answers
from audio_grpo.training.batches import audio_of, place, prompts_of, reading_share
from audio_grpo.training.durations import DURATIONS, duration_of
from audio_grpo.training.evaluation_report import ErrorRates, EvaluationReport, Utterance
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import Session, create_session
from audio_grpo.training.weights import run_weights

_UTTERANCES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class _Heard:
    """One evaluated clip."""

    id: str
    language: str | None
    seconds: float
    reference: str
    scored: ScoredAnswer


def evaluate_run(config: Config) -> EvaluationReport:
    """Evaluate the newest weights of the configured run, and note the result in its folder where it has one."""
    start_processes()
    session = create_session(config)
    run = RunFolder(epath.Path(config.base_output_directory).expanduser() / config.run_name)
    evaluator = Evaluator(session)
    found = run_weights(session, run)
    report = evaluator.run(found.weights, stage=found.stage, step=found.step)
    if is_first() and run.config_path.exists():
        run.write_evaluation(report)
    return report


class Evaluator:
    """Transcribes the evaluation clips greedily; its programs are compiled once."""

    def __init__(self, session: Session) -> None:
        config = session.config
        if config.grain_eval_files is None:
            raise UserError("grain_eval_files is not set: name the ArrayRecord data to evaluate on.")
        self._session = session
        self._files = config.grain_eval_files
        settings = engine_settings(config)
        greedy = Sampling(greedy=True, temperature=settings.sampling.temperature)
        self._settings = replace(settings, sampling=greedy, generations=1, router_replay=False)
        shards = batch_shards(session.mesh)
        self._batch_size = -(-config.max_slots // shards) * shards
        self._engine: OfflineEngine | None = None

    def run(self, weights: dict[str, Array], *, stage: str, step: int) -> EvaluationReport:
        """Evaluate `weights`, which are those after `step` updates of `stage`."""
        session = self._session
        if self._engine is None:
            self._engine = OfflineEngine(
                session.config,
                weights,
                mesh=session.mesh,
                special=session.special,
                settings=self._settings,
                tokenizer=session.tokenizer,
                store=session.clip_store,
            )
        self._engine.weights = weights
        share = reading_share(session.mesh, self._batch_size)
        batches = evaluation_batches(session.config, self._files, self._batch_size, share)
        heard = [clip for batch in batches for clip in self._transcribe(self._engine, batch)]
        normalizer = get_normalizer(session.config.text_normalizer)
        return EvaluationReport(
            stage=stage,
            step=step,
            text_normalizer=normalizer.name,
            text_normalizer_version=normalizer.version,
            rates=_rates(heard),
            by_language=_grouped(heard, sorted({clip.language or "unknown" for clip in heard}), _language),
            by_duration=_grouped(heard, DURATIONS, _duration),
            utterances=_best_and_worst(heard),
        )

    def _transcribe(self, engine: OfflineEngine, batch: dict[str, Any]) -> list[_Heard]:
        session, column = self._session, self._session.config.prompt_column
        audio = place(session.mesh, audio_of(batch))
        rollout = generate_offline_completions(engine, prompts_of(batch, column), audio, batch["id"], seed=0)
        texts = [group[0] for group in decode_completions(session, rollout.tokens, rollout.mask)]
        scored = score_answers(session, texts, batch["ground_truth_text"], batch["language"])
        columns = zip(
            batch["id"], batch["language"], batch["audio_seconds"], batch["ground_truth_text"], scored, strict=True
        )
        return [_Heard(*row) for row, valid in zip(columns, batch["valid"], strict=True) if valid]


def _rates(clips: Iterable[_Heard]) -> ErrorRates:
    clips = list(clips)
    words = sum((clip.scored.words for clip in clips), EditCounts())
    characters = sum((clip.scored.characters for clip in clips), EditCounts())
    return ErrorRates(
        clips=len(clips),
        reference_words=words.reference_length,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        reference_characters=characters.reference_length,
        cer_edits=characters.errors,
    )


def _language(clip: _Heard) -> str:
    return clip.language or "unknown"


def _duration(clip: _Heard) -> str:
    return duration_of(clip.seconds)


def _grouped(clips: list[_Heard], names: Sequence[str], name_of: Any) -> dict[str, ErrorRates]:
    groups = {name: [clip for clip in clips if name_of(clip) == name] for name in names}
    return {name: _rates(group) for name, group in groups.items() if group}


def _best_and_worst(clips: list[_Heard]) -> tuple[Utterance, ...]:
    ranked = sorted(clips, key=lambda clip: (clip.scored.words.rate, clip.id))
    half = _UTTERANCES_SHOWN // 2
    shown = ranked if len(ranked) <= _UTTERANCES_SHOWN else ranked[:half] + ranked[-half:]
    return tuple(
        Utterance(id=c.id, reference=c.reference, hypothesis=c.scored.answer or "", wer=c.scored.words.rate)
        for c in shown
    )
