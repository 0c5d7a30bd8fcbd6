import numpy as np
import pytest

from audio_grpo.audio import audio_token_count

PUBLISHED = dict.fromkeys(range(1, 9), 1) | dict.fromkeys(range(9, 17), 2) | dict.fromkeys(range(93, 97), 12)
PUBLISHED |= {0: 0, 17: 3, 50: 7, 97: 13, 100: 13, 101: 14, 200: 26, 307: 40, 800: 104, 1000: 130, 3000: 390}


@pytest.mark.parametrize(("frames", "tokens"), PUBLISHED.items())
def test_counts_are_the_published_ones(frames, tokens):
    assert audio_token_count(frames) == tokens


def test_an_array_is_counted_element_by_element():
    counts = audio_token_count(np.array(list(PUBLISHED), np.int32))
    assert counts.tolist() == list(PUBLISHED.values())


@pytest.mark.parametrize("chunk_frames", [100, 200])
def test_counts_equal_three_strided_convolutions_over_each_chunk(chunk_frames):
    def convolve_chunks(frames: int) -> int:
        tokens = 0
        for start in range(0, frames, chunk_frames):
            row = [0] * min(chunk_frames, frames - start)
            for _ in range(3):
                row = row[::2]  # kernel 3, stride 2, padding 1 centres on every other position
            tokens += len(row)
        return tokens

    assert [audio_token_count(n, chunk_frames) for n in range(450)] == [convolve_chunks(n) for n in range(450)]
