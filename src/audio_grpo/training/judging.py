"""What sampled completions are worth: rewards and errors.

Prompts are judged one by one as they are answered, in a thread beside the one that drives the device, so that the host
works while the device samples. Each process judges its share of them.
"""

from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Event
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from audio_grpo.parallel.processes import gather, share_out
from audio_grpo.rewards import RewardFunction, RewardTable, score_completions
from audio_grpo.training.answers import ScoredAnswer, score_answers
from audio_grpo.training.session import Session
from audio_grpo.training.transcripts import transcript_ids
from audio_grpo.types import RequestResult

_COLUMNS = ("ground_truth_text", "language", "id", "audio_seconds")
"""What reward functions are given of a batch."""


class Judgement(NamedTuple):
    """Of G completions of each of B prompts."""

    rewards: RewardTable
    """With `inject_transcript`, of G + 1: the transcript's come last."""
    answers: list[list[ScoredAnswer]]


class Judging:
    """Judges a batch's prompts while others are still being answered; use it in a `with`.

    The result is the same in all processes even where a reward function is not deterministic.
    """

    def __init__(
        self,
        session: Session,
        functions: list[RewardFunction],
        batch: dict[str, Any],
        cancelled: Event | None = None,
    ) -> None:
        """Once another thread has set `cancelled`, to take or to judge a further prompt raises CancelledError."""
        self._session, self._functions, self._batch = session, functions, batch
        self._cancelled = cancelled
        self._own = share_out(len(batch["id"])).tolist()
        self._judged: dict[int, Future[Judgement]] = {}
        # One thread: a reward function need not bear to be called twice at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judging")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, prompt: int, result: RequestResult) -> None:
        """Judge the completions of one of the batch's prompts, if it falls to this process."""
        self._go_on()
        if prompt in self._own:
            self._judged[prompt] = self._thread.submit(self._judge, prompt, result)

    def result(self) -> Judgement:
        """Of all prompts, once all of them were taken; an infinite reward counts as NaN.

        Raises:
            UserError: a reward function did not return a float for each completion. What it raises comes through.
        """
        shares = gather(lambda: [self._judged[prompt].result() for prompt in self._own])
        parts = [part for share in shares for part in share]
        values = np.concatenate([part.rewards.values for part in parts], axis=1)
        finite = np.where(np.isfinite(values), values, np.float32(np.nan))
        table = RewardTable(names=parts[0].rewards.names, values=finite)
        return Judgement(table, [answers for part in parts for answers in part.answers])

    def _go_on(self) -> None:
        if self._cancelled is not None and self._cancelled.is_set():
            raise CancelledError

    def _judge(self, prompt: int, result: RequestResult) -> Judgement:
        self._go_on()
        session, column = self._session, self._session.config.prompt_column
        own = {name: [self._batch[name][prompt]] for name in (*_COLUMNS, column, f"{column}_true_length")}
        ids = [completion.token_ids.tolist() for completion in result.completions]
        texts = [session.tokenizer.decode(each, skip_special_tokens=True) for each in ids]
        count = len(texts)
        answers = score_answers(session, texts, own["ground_truth_text"] * count, own["language"] * count)
        table = reward_table(session, self._functions, own, [texts], [ids], must_be_finite=False)
        return Judgement(table, [answers])


def reward_table(
    session: Session,
    functions: list[RewardFunction],
    batch: dict[str, Any],
    texts: list[list[str]],
    ids: list[list[list[int]]],
    *,
    must_be_finite: bool = True,
) -> RewardTable:
    """What each function pays for a batch's completions, given as texts and as token ids.

    With `inject_transcript` each group has a completion more, which comes last: its clip's transcript.
    """
    if session.config.inject_transcript:
        written = transcript_ids(session, batch)
        ids = [[*group, last] for group, last in zip(ids, written, strict=True)]
        decoded = [session.tokenizer.decode(each, skip_special_tokens=True) for each in written]
        texts = [[*group, last] for group, last in zip(texts, decoded, strict=True)]
    column = session.config.prompt_column
    rows = zip(batch[column], batch[f"{column}_true_length"], strict=True)
    prompts = [session.tokenizer.decode(row[:length].tolist(), skip_special_tokens=True) for row, length in rows]
    columns = {name: list(batch[name]) for name in _COLUMNS}
    return score_completions(
        functions,
        prompts=prompts,
        completions=texts,
        completion_ids=ids,
        columns=columns,
        config=session.config,
        must_be_finite=must_be_finite,
    )
