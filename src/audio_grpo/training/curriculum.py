"""What is known of each clip so far, and which clips are passed over for it when their turn comes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from audio_grpo.config import Config
from audio_grpo.data import AudioDataIterator
from audio_grpo.training.rows import picked_batch
from audio_grpo.types import SkippedRecords

Batch = dict[str, Any]


@dataclass(slots=True)
class ClipHistory:
    """How the groups sampled for a clip did."""

    seen: int = 0
    """Groups so far."""
    reward: float = 0.0
    """Mean of their completions' total rewards."""
    wer: float = 0.0
    """Mean of their completions' word error rates."""
    alike: int = 0
    """Groups in a row, up to the last one, whose rewards were all equal."""

    def note(self, reward: float, wer: float, *, teaches: bool) -> None:
        """Take in a further group's means, and whether its rewards differed."""
        self.seen += 1
        self.reward += (reward - self.reward) / self.seen
        self.wer += (wer - self.wer) / self.seen
        self.alike = 0 if teaches else self.alike + 1


class Curriculum(Iterator[Batch]):
    """Batches of the data pipeline, without most of the clips that are solved or hopeless for now.

    A clip of which the last `zero_std_skip_after` groups had equal rewards is passed over with
    `zero_std_skip_probability` each time that its turn comes. The clips that follow it move up, so every batch is full
    and no other clip is lost. Which clips these are depends on the seed, the data and what was noted alone.
    """

    def __init__(self, data: AudioDataIterator, config: Config) -> None:
        self._data = data
        self._seed = config.seed
        self._probability, self._after = config.zero_std_skip_probability, config.zero_std_skip_after
        self.clips: dict[str, ClipHistory] = {}
        """By the record's name."""
        self._reads = self._passed_over = 0
        self._batch: Batch = {}
        self._rows = np.arange(0)
        """Of `_batch`, those that no batch has taken yet."""
        self._before = b""
        """Where `_batch` was read from."""

    @property
    def skipped(self) -> SkippedRecords:
        """Unusable records."""
        return self._data.skipped

    @property
    def metrics(self) -> dict[str, float]:
        """Clips that were sampled for, those of them that may be passed over now, and how often that was done."""
        idle = sum(self._is_idle(history) for history in self.clips.values())
        told = {"seen": len(self.clips), "may_be_passed_over": idle, "passed_over": self._passed_over}
        return {f"clips/{name}": float(count) for name, count in told.items()}

    def __next__(self) -> Batch:
        if not len(self._rows):
            self._read()
        batch, source = self._batch, self._rows
        size = len(batch["id"])
        self._rows = source[:0]
        while len(source) < size:
            self._read()
            taken, self._rows = np.split(self._rows, [size - len(source)])
            unfilled = np.zeros(size - len(source) - len(taken), int)
            batch = picked_batch(batch, self._batch, np.concatenate([source, size + taken, unfilled]))
            source = np.arange(len(source) + len(taken))
        return batch

    def note(
        self,
        ids: Sequence[str],
        rewards: Float[np.ndarray, "B"],
        rates: Float[np.ndarray, "B"],
        teaches: Bool[np.ndarray, "B"],
    ) -> None:
        """Take in what was sampled for B clips: groups' mean rewards and error rates, and which had different rewards.

        Of a group with a reward that is no number nothing is noted.
        """
        for name, reward, rate, differs in zip(ids, rewards, rates, teaches, strict=True):
            if np.isfinite(reward):
                self.clips.setdefault(name, ClipHistory()).note(float(reward), float(rate), teaches=bool(differs))

    def get_state(self) -> bytes:
        """JSON that says where the next batch begins and what was noted; the same in all processes."""
        state = {
            "data": json.loads(self._before if len(self._rows) else self._data.get_state()),
            "rows": self._rows.tolist(),
            "reads": self._reads,
            "passed_over": self._passed_over,
            "clips": {name: astuple(history) for name, history in self.clips.items()},
        }
        return json.dumps(state).encode()

    def set_state(self, state: bytes) -> None:
        """Takes over the place of `get_state`. Raises UserError where data, seed or batch size differ from then."""
        then = json.loads(state)
        self._before = json.dumps(then["data"]).encode()
        self._data.set_state(self._before)
        self._rows = np.array(then["rows"], int)
        if then["rows"]:
            self._batch = next(self._data)
        self._reads, self._passed_over = then["reads"], then["passed_over"]
        self.clips = {name: ClipHistory(*history) for name, history in then["clips"].items()}

    def close(self) -> None:
        """Ends reading threads and worker processes."""
        self._data.close()

    def _read(self) -> None:
        self._before = self._data.get_state()
        self._batch = next(self._data)
        draws = np.random.default_rng([self._seed, self._reads]).random(len(self._batch["id"]))
        idle = np.array([self._is_idle(self.clips.get(name, ClipHistory())) for name in self._batch["id"]])
        passed_over = idle & (draws < self._probability)
        self._reads += 1
        self._passed_over += int(passed_over.sum())
        self._rows = np.flatnonzero(~passed_over)

    def _is_idle(self, history: ClipHistory) -> bool:
        return history.alike >= self._after
