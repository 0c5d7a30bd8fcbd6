"""Steps that sample the next batch while they learn their own, whose completions are then one step older."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

from audio_grpo.rewards import RewardFunction
from audio_grpo.rollout import OfflineEngine
from audio_grpo.training.dynamic_sampling import Filled
from audio_grpo.training.learning import learn_groups
from audio_grpo.training.loop import StepResult, Trainer, checkpoint_follows
from audio_grpo.training.sampling import move_weights, sample_groups
from audio_grpo.training.stopwatch import Stopwatch

Value = TypeVar("Value")


class AheadSteps:
    """Does a run's steps one after another.

    While step k learns, a thread draws and samples what step k + 1 learns from, with the weights from before k's
    update; both are over when the step is. So only one thread at a time touches the data and what is known of clips,
    in the order in which a run without this does, and evaluations and checkpoints find nothing under way. What follows
    a checkpoint is sampled from the weights that it kept, so that a run can go on from there as if it had not stopped.
    """

    def __init__(self, engine: OfflineEngine, rewards: list[RewardFunction]) -> None:
        self._engine, self._rewards = engine, rewards
        self._ahead: Filled | None = None
        """What the step before sampled for this one."""

    def __call__(self, trainer: Trainer, step: int) -> StepResult:
        """Sample unless that was done ahead, learn, and sample for the next step meanwhile."""
        watch, config, groups = Stopwatch(), trainer.session.config, self._ahead
        last = step == config.steps or checkpoint_follows(config, step)
        if groups is None or not last:
            with watch("weights"):
                move_weights(trainer, self._engine)
        if groups is None:
            groups = self._sampled_now(trainer, step, watch)
        self._ahead = None
        if last:
            return learn_groups(trainer, groups, step, watch).timed(watch.metrics)
        with beside(lambda cancelled: self._sampled_ahead(trainer, step + 1, cancelled)) as ahead:
            result = learn_groups(trainer, groups, step, watch)
            with watch("rollout"):
                self._ahead = ahead.result()
        return result.timed(watch.metrics)

    def _sampled_now(self, trainer: Trainer, step: int, watch: Stopwatch) -> Filled:
        with watch("data"):
            batch = next(trainer.data)
        filled = sample_groups(trainer, self._engine, self._rewards, batch, step, watch)
        return _with_metrics(filled, {"rollout/ahead": 0.0, "seconds/ahead": 0.0})

    def _sampled_ahead(self, trainer: Trainer, step: int, cancelled: Event) -> Filled:
        watch = Stopwatch()
        with watch("ahead"):
            batch = next(trainer.data)
            filled = sample_groups(trainer, self._engine, self._rewards, batch, step, Stopwatch(), cancelled)
        return _with_metrics(filled, {"rollout/ahead": 1.0, **watch.metrics})


@contextmanager
def beside(work: Callable[[Event], Value]) -> Iterator[Future[Value]]:
    """Does `work` in a thread that is over when the body is; a body that raises tells it so by the event."""
    cancelled = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        try:
            yield thread.submit(work, cancelled)
        except BaseException:
            cancelled.set()
            raise


def _with_metrics(filled: Filled, metrics: dict[str, float]) -> Filled:
    return filled._replace(metrics={**filled.metrics, **metrics})
