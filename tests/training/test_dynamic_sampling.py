"""Groups that teach nothing make room for others, in their places; and a run that does so can be resumed."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_runs import kept_programs, metrics_of, tiny_config, with_tones

from audio_grpo.grpo import AdvantageSettings, Rollout
from audio_grpo.rewards import RewardTable
from audio_grpo.training import grpo_loop, train_loop
from audio_grpo.training.dynamic_sampling import Groups, fill
from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.types import Routes

B, G = 4, 2
SETTINGS = AdvantageSettings()


def groups_of(first, *teaches):
    """Clips `first`, `first` + 1 and so on; every column tells which clip it belongs to."""
    clips = np.arange(first, first + B)
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
    heard = jax.device_put(np.float32(clips)[:, None, None], NamedSharding(mesh, PartitionSpec("data")))
    wide = np.repeat(clips, G).reshape(B, G)
    rewards = np.stack([np.zeros(B), teaches], axis=1).astype(np.float32)
    columns = wide[..., None].astype(np.int32), np.ones((B, G, 1), bool)
    log_probs = np.float32(wide)[..., None]
    routes = Routes(clips[:, None, None], wide[..., None, None])
    return Groups(
        batch={"id": [f"clip {clip}" for clip in clips], "audio_seconds": np.float32(clips)},
        rollout=Rollout(*columns, log_probs, -log_probs, [[str(clip)] * G for clip in clips], heard, routes),
        rewards=RewardTable(names=("r", "tenfold"), values=np.stack([rewards, 10 * rewards])),
        answers=[[clip] * G for clip in clips],
    )


def clips_of(groups):
    """The clips of a batch's places, by every column, which must agree."""
    rollout = groups.rollout
    clips = groups.batch["audio_seconds"].astype(int).tolist()
    assert groups.batch["id"] == [f"clip {clip}" for clip in clips]
    assert groups.answers == [[clip] * G for clip in clips]
    assert rollout.finish_reasons == [[str(clip)] * G for clip in clips]
    columns = rollout.tokens, rollout.log_probs, -rollout.log_kept, np.asarray(rollout.heard), *rollout.routes
    for column in columns:
        assert [set(np.ravel(row).astype(int)) for row in column] == [{clip} for clip in clips]
    return clips


def filled(*rounds, most):
    sampled = []

    def further(number):
        sampled.append(number)
        return groups_of(100 * number, *rounds[number])

    groups, metrics = fill(groups_of(0, *rounds[0]), further, SETTINGS, most)
    assert sampled == list(range(1, len(sampled) + 1))
    return groups, {name.removeprefix("dynamic_sampling/"): value for name, value in metrics.items()}


def test_a_batch_whose_groups_all_teach_is_taken_as_it_comes():
    groups, metrics = filled((1, 1, 1, 1), most=3)
    assert clips_of(groups) == [0, 1, 2, 3]
    assert metrics == {"rounds": 0, "replaced": 0, "unused": 0, "frac_reward_zero_std": 0}


def test_others_fill_the_places_of_those_that_teach_nothing_in_their_order():
    groups, metrics = filled((1, 0, 1, 0), (0, 1, 1, 1), most=3)
    assert clips_of(groups) == [0, 101, 2, 102]
    np.testing.assert_array_equal(groups.rewards.values[1], [[0, 10]] * 4)
    assert metrics == {"rounds": 1, "replaced": 2, "unused": 1, "frac_reward_zero_std": 3 / 8}


def test_rounds_follow_one_another_until_all_places_are_filled():
    groups, metrics = filled((0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 0, 0), (0, 1, 1, 1), most=9)
    assert clips_of(groups) == [102, 301, 302, 3]
    assert metrics == {"rounds": 3, "replaced": 3, "unused": 1, "frac_reward_zero_std": 11 / 16}


def test_what_teaches_nothing_after_the_last_round_stays():
    groups, metrics = filled((0, 0, 1, 0), (0, 1, 0, 0), (0, 0, 0, 0), most=2)
    assert clips_of(groups) == [101, 1, 2, 3]
    np.testing.assert_array_equal(groups.rewards.values[0, :, 1], [1, 0, 1, 0])
    assert (metrics["rounds"], metrics["replaced"]) == (2, 1)


def test_a_reward_that_is_no_number_is_not_hidden_by_another():
    groups, metrics = filled((1, np.nan, 1, 1), most=3)
    assert clips_of(groups) == [0, 1, 2, 3]
    assert metrics["rounds"] == 0


def test_embeddings_stay_where_they_were():
    groups, _ = filled((1, 0, 1, 1), (1, 1, 1, 1), most=1)
    assert groups.rollout.heard.sharding == groups_of(0, 1, 1, 1, 1).rollout.heard.sharding


REWARD = '''
from zlib import crc32

def lucky(completions, **columns):
    """Tells completions apart for two clips of three."""
    pairs = zip(completions, columns["id"])
    return [float(crc32(text.encode()) % 5) if crc32(name.encode()) % 3 else 1.0 for text, name in pairs]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = with_tones(tmp_path_factory.mktemp("dynamic"), count=20)
    (folder / "lucky.py").write_text(REWARD)
    with kept_programs(folder / "programs"):
        yield folder


def config_of(folder, name, **changes):
    rewards = [f"{folder / 'lucky.py'}:lucky"]
    keys = {"reward_functions": rewards, "steps": 4, "checkpoint_period": 2, "dynamic_sampling_max_rounds": 3}
    return tiny_config(folder, run_name=name, **(keys | changes))


@pytest.mark.slow
def test_a_run_learns_only_from_groups_that_teach_and_is_the_same_after_an_interruption(folder, monkeypatch):
    whole = train_loop(config_of(folder, "whole"))
    metrics = metrics_of(whole)
    assert sum(step["dynamic_sampling/replaced"] for step in metrics) > 0
    assert all(step["frac_reward_zero_std"] == 0 or step["dynamic_sampling/rounds"] == 3 for step in metrics)
    assert any(step["frac_reward_zero_std"] < step["dynamic_sampling/frac_reward_zero_std"] for step in metrics)
    step = grpo_loop.grpo_step

    def stopping(*args):
        if args[-1] == 4:
            raise KeyboardInterrupt
        return step(*args)

    config = config_of(folder, "interrupted")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grpo_loop, "grpo_step", stopping)
        train_loop(config)
    resumed = train_loop(config)
    assert metrics_of(resumed) == metrics
    assert resumed.completions_path.read_text() == whole.completions_path.read_text()


def test_without_rounds_groups_that_teach_nothing_stay(folder):
    metrics = metrics_of(train_loop(config_of(folder, "off", dynamic_sampling_max_rounds=0, steps=2)))
    assert any(step["frac_reward_zero_std"] > 0 for step in metrics)
    assert not any(name.startswith("dynamic_sampling/") for step in metrics for name in step)


def test_completions_that_are_shown_are_those_that_were_learned_from(folder):
    run = train_loop(config_of(folder, "shown", steps=2, log_completions=8))
    shown = JsonLinesFile(run.completions_path).read().records
    replaced = [step["frac_reward_zero_std"] == 0 for step in metrics_of(run)]
    assert any(replaced)
    for step, learned in enumerate(replaced, 1):
        if learned:
            assert all(each["advantage"] != 0 for each in shown if each["step"] == step)
