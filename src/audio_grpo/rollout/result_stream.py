"""Results of requests as they are done."""

from collections.abc import Generator, Iterator, Sequence

from audio_grpo.rollout.generation import Generation
from audio_grpo.types import RequestResult


class ResultStream(Iterator[tuple[int, RequestResult]]):
    """An iterator of (request's index, result): first those that can not be answered, then each when it is done."""

    def __init__(
        self, *, failed: Sequence[tuple[int, RequestResult]], indices: Sequence[int], generation: Generation | None
    ) -> None:
        """`indices` are those of the generation's prompts among the requests."""
        self._generation = generation
        self._prompts = {index: prompt for prompt, index in enumerate(indices)}
        self._results = self._told(failed, indices)

    def __next__(self) -> tuple[int, RequestResult]:
        return next(self._results)

    def cancel(self, index: int) -> None:
        """End a request; its result says so, unless it was given out before."""
        if self._generation is not None and index in self._prompts:
            self._generation.cancel(self._prompts[index])

    def close(self) -> None:
        """End all that is still being answered."""
        self._results.close()

    def _told(
        self, failed: Sequence[tuple[int, RequestResult]], indices: Sequence[int]
    ) -> Generator[tuple[int, RequestResult], None, None]:
        yield from failed
        if self._generation is not None:
            for prompt, result in self._generation:
                yield indices[prompt], result
