import json
import math
from functools import partial
from importlib import import_module

import jax
import numpy as np
import pytest
from tiny_runs import kept_programs, metrics_of, tiny_config, with_tones

from audio_grpo.errors import UserError
from audio_grpo.grpo import Rollout
from audio_grpo.rewards import RewardFunction, resolve_reward
from audio_grpo.training import grpo_loop, loop, sampling, setup_train_loop, sft_loop, train_loop
from audio_grpo.training.batches import audio_of, place
from audio_grpo.training.checkpoints import latest_step
from audio_grpo.training.grpo_loop import grpo_step
from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.learning import learner_batch
from audio_grpo.training.loop import gradients, score
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import create_grpo_session, create_session
from audio_grpo.training.weights import run_weights, starting_weights

# The package's attribute of this name is the function.
sft_module = import_module("audio_grpo.training.sft_loop")

SFT_STEPS, STEPS = 3, 4
COMPILATION = "/jax/core/compile/backend_compile_duration"
compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: compiled.append(event))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = with_tones(tmp_path_factory.mktemp("loop"))
    with kept_programs(folder / "programs"):
        yield folder


def config_of(folder, **changes):
    settings = {"steps": STEPS, "checkpoint_period": 2, "eval_interval": 2, "eval_max_clips": 4, "log_completions": 3}
    return tiny_config(folder, **({"grain_eval_files": str(folder / "data")} | settings | changes))


def plain(folder, **changes):
    """A run that only learns."""
    return config_of(folder, grain_eval_files=None, enable_checkpointing=False, **changes)


def supervised(config):
    return sft_loop(config.model_copy(update={"steps": SFT_STEPS}))


def weights_of(config):
    session = create_session(config)
    run = RunFolder.create(config.base_output_directory, config.run_name)
    return {key: np.asarray(value) for key, value in run_weights(session, run).weights.items()}


def rows(path):
    return JsonLinesFile(path).read().records


@pytest.fixture(scope="module")
def whole(folder):
    """Supervised steps, then GRPO, never interrupted; and what each GRPO step compiled."""
    config, counts = config_of(folder, run_name="whole"), []
    step = grpo_loop.grpo_step

    def counting(*args):
        before = compiled.count(COMPILATION)
        result = step(*args)
        counts.append(compiled.count(COMPILATION) - before)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_loop, "grpo_step", counting)
        supervised(config)
        run = train_loop(config)
    return config, run, counts


def test_a_run_leaves_everything_in_its_folder(whole):
    _, run, _ = whole
    names = {"checkpoints", "clips", "completions.jsonl", "config.yml", "environment.json", "evaluations.jsonl"}
    assert {path.name for path in run.path.iterdir()} == names | {"metrics.jsonl"}
    assert [(m["phase"], m["step"]) for m in metrics_of(run)] == [
        (phase, step) for phase, last in (("sft", SFT_STEPS), ("grpo", STEPS)) for step in range(1, last + 1)
    ]
    assert [(e["stage"], e["step"]) for e in rows(run.evaluations_path)] == [
        ("start", 0), ("sft", 2), ("sft", 3), ("grpo", 2), ("grpo", 4),
    ]  # fmt: skip
    completions = rows(run.completions_path)
    assert [c["step"] for c in completions] == [step for step in range(1, STEPS + 1) for _ in range(3)]
    assert {c["audio"] for c in completions} == {path.name for path in run.clips.iterdir()}
    assert (latest_step(run.checkpoints / "sft"), latest_step(run.checkpoints / "grpo")) == (SFT_STEPS, STEPS)
    assert json.loads(run.environment_path.read_text())["devices"].startswith("4 x")


def test_every_number_of_a_run_is_finite_and_what_it_says(whole):
    _, run, _ = whole
    for metrics in metrics_of(run):
        assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float)), metrics
    first = metrics_of(run)[SFT_STEPS]
    assert first["phase"] == "grpo"
    assert first["reward"] == first["rewards/asr_wer_reward/mean"]
    assert first["completions/min_length"] <= first["completions/mean_length"] <= first["completions/max_length"] <= 12
    assert first["policy_ratio/mean"] == 1
    assert first["sampling/sampling_logp_difference/max"] < 1e-4
    assert first["kl"] < 1e-9 < metrics_of(run)[-1]["kl"]
    assert first["grad_norm"] > 0


def test_only_the_first_step_compiles(whole):
    _, _, counts = whole
    assert counts[0] > 0
    assert counts[1:] == [0] * (STEPS - 1)


def test_grpo_starts_from_what_supervised_training_learned_and_the_frozen_tower_stays(whole):
    config, _, _ = whole
    session = create_session(config)
    start, warm, last = starting_weights(session, "sft"), starting_weights(session, "grpo"), weights_of(config)
    for key in start:
        assert (np.asarray(start[key]) == warm[key]).all() == key.startswith("audio_tower."), key
        assert (np.asarray(warm[key]) == last[key]).all() == key.startswith("audio_tower."), key


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(whole, folder, monkeypatch):
    """Both phases stop before their last step and go on from the checkpoint of step 2."""
    config, uninterrupted, _ = whole
    config = config.model_copy(update={"run_name": "interrupted"})
    phases = ((sft_module, "sft_step", supervised, SFT_STEPS), (grpo_loop, "grpo_step", train_loop, STEPS))
    for module, name, run, last in phases:
        step = getattr(module, name)

        def stopping(*args, step=step, last=last):
            if args[-1] == last:
                raise KeyboardInterrupt
            return step(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, stopping)
            run(config)
        resumed = run(config)
    assert metrics_of(resumed) == metrics_of(uninterrupted)
    assert resumed.completions_path.read_text() == uninterrupted.completions_path.read_text()
    assert resumed.evaluations_path.read_text() == uninterrupted.evaluations_path.read_text()
    expected = weights_of(whole[0])
    for key, value in weights_of(config).items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


def test_a_finished_run_that_is_started_again_changes_nothing(whole):
    config, run, _ = whole
    files = (run.metrics_path, run.completions_path, run.evaluations_path, run.config_path)
    before = [path.read_text() for path in files]
    supervised(config)
    train_loop(config)
    assert [path.read_text() for path in files] == before


def test_a_run_can_start_from_another_runs_weights(whole, folder):
    config, run, _ = whole
    further = config.model_copy(update={"run_name": "further", "load_parameters_path": str(run.path), "seed": 9})
    start, expected = starting_weights(create_session(further), "sft"), weights_of(config)
    for key, value in start.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


def test_weights_of_another_model_are_refused(whole):
    config, run, _ = whole
    other = config.model_copy(update={"load_parameters_path": str(run.path), "num_decoder_layers": 2})
    with pytest.raises(UserError, match=r"is another model than the configuration's: .* Give the model_name"):
        starting_weights(create_session(other), "sft")


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(folder):
    config = plain(folder, run_name="odd", per_device_batch_size=1.5)
    with pytest.raises(UserError, match="A batch of 6 prompts does not divide over 4 devices: set per_device_batch"):
        sft_loop(config)


@pytest.fixture(scope="module")
def on_mesh(folder):
    """Runs three GRPO steps on a mesh; gives each step's metrics and sampled tokens."""

    def run(devices, **sizes):
        keys = {f"ici_{axis}_parallelism": sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
        name = "-".join(f"{axis}{size}" for axis, size in sizes.items())
        config = plain(folder, run_name=name, steps=3, per_device_batch_size=4 / devices, **keys)
        sampled, sample = [], sampling.sample

        def noting(*args):
            sampled.append(sample(*args))
            return sampled[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "create_grpo_session", partial(create_grpo_session, devices=jax.devices()[:devices]))
            patch.setattr(sampling, "sample", noting)
            metrics = metrics_of(train_loop(config))
        return metrics, [rollout.tokens for rollout in sampled]

    return run


@pytest.fixture(scope="module")
def on_one_device(on_mesh):
    return on_mesh(1, fsdp=1)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}])
def test_four_devices_learn_what_one_does(on_mesh, on_one_device, sizes):
    metrics, tokens = on_mesh(4, **sizes)
    np.testing.assert_array_equal(tokens, on_one_device[1])
    for several, one in zip(metrics, on_one_device[0], strict=True):
        assert several.keys() == one.keys()
        for name in several.keys() - {"phase"}:
            assert several[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), name


def test_a_rate_of_zero_leaves_every_weight_as_it_is(folder):
    config = config_of(folder, run_name="rate-0", learning_rate=0.0, steps=20, grain_eval_files=None)
    before = starting_weights(create_session(config), "grpo")
    for metrics in metrics_of(train_loop(config)):
        assert metrics["policy_ratio/mean"] == 1
        assert metrics["clip_ratio/region_mean"] == 0
        assert metrics["kl"] < 1e-9
        assert metrics["grad_norm"] > 0
    for key, value in weights_of(config).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


def test_a_loss_that_is_no_number_stops_the_run_with_a_sentence(folder):
    changes = {"learning_rate": 1e30, "checkpoint_period": 1, "grain_eval_files": None, "max_skipped_updates": 1}
    config = config_of(folder, run_name="nan", **changes)
    sentence = (
        "Update 2 has loss nan and gradient norm nan: lower learning_rate .* It is number 2 in a row to be skipped for "
        "a NaN or an infinity, here in loss, and max_skipped_updates is 1"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        sft_loop(config)
    run = RunFolder.open(f"{config.base_output_directory}/nan")
    skipped = [(m["skipped_updates"], m.get("skipped_updates/loss")) for m in metrics_of(run)]
    assert skipped == [(0, None), (1, 1)]
    assert latest_step(run.checkpoints / "sft") == 2
    # A run that goes on from there has skipped one in a row already.
    with pytest.raises(FloatingPointError, match="It is number 2 in a row"):
        sft_loop(config)


def bad_reward(completions, **_):
    """One completion's worth is no number."""
    return [float("inf"), *[0.5] * (len(completions) - 1)]


@pytest.mark.parametrize("cause", ["rewards", "sampler_log_probs"])
def test_a_step_with_a_nan_is_skipped_and_counted_with_its_cause_and_the_next_one_learns(folder, cause, monkeypatch):
    trainer, engine = setup_train_loop(plain(folder, num_iterations=2))
    functions = [resolve_reward("asr_wer_reward")]
    before = {key: np.asarray(value) for key, value in trainer.weights.items()}
    sample = sampling.sample

    def spoiled(*args):
        rollout = sample(*args)
        rollout.log_probs[1, 1, 0] = np.nan
        return rollout

    with monkeypatch.context() as patch:
        if cause == "sampler_log_probs":
            patch.setattr(sampling, "sample", spoiled)
        rewards = [RewardFunction("bad", bad_reward)] if cause == "rewards" else functions
        metrics = grpo_step(trainer, engine, rewards, next(trainer.data), 1).metrics
    skipped = {name: value for name, value in metrics.items() if name.startswith("skipped_updates")}
    assert skipped == {"skipped_updates": 2, f"skipped_updates/{cause}": 2}
    for key, value in trainer.weights.items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    metrics = grpo_step(trainer, engine, functions, next(trainer.data), 2).metrics
    assert metrics["skipped_updates"] == 0
    assert metrics["grad_norm/attention"] > 0
    assert (int(trainer.state.step), int(trainer.state.skipped)) == (2, 0)


@pytest.mark.parametrize("options", [{}, {"inject_transcript": True, "sft_coef": 0.5, "entropy_coef": 0.1}])
def test_accumulated_gradients_are_those_of_the_whole_batch(folder, options):
    """Eight prompts at once, and in two parts."""
    rng = np.random.default_rng(0)
    shape = (8, 2, 12)
    mask = np.arange(12) < rng.integers(1, 13, shape[:2])[..., None]
    tokens = rng.integers(300, 1000, shape).astype(np.int32)
    advantages = rng.normal(size=(8, 3 if options else 2)).astype(np.float32)
    found = []
    for prompts, count in ((2, 1), (1, 2)):
        trainer, _ = setup_train_loop(
            plain(folder, per_device_batch_size=prompts, gradient_accumulation_steps=count, loss_type="dapo", **options)
        )
        batch = next(trainer.data)
        heard = trainer.hearing(trainer.weights, place(trainer.session.mesh, audio_of(batch)))
        rollout = Rollout(
            tokens, mask, np.zeros(shape, np.float32), np.zeros(shape, np.float32), [["length"] * 2] * 8, heard
        )
        groups, heard = learner_batch(trainer, batch, rollout, advantages)
        found.append((groups.reference_log_probs, *gradients(trainer, groups, heard)))
    (whole_reference, whole, whole_aux), (reference, parts, aux) = found
    np.testing.assert_allclose(whole_reference, reference, atol=1e-5)
    assert whole_aux.means() == pytest.approx(aux.means(), rel=1e-4, abs=1e-4)
    for key, value in whole.items():
        np.testing.assert_allclose(parts[key], value, atol=1e-4 * np.abs(value).max() + 1e-9, err_msg=key)


def test_further_iterations_depart_from_the_policy_that_sampled_and_the_reference_stays(folder):
    trainer, engine = setup_train_loop(plain(folder, num_iterations=2, learning_rate=3e-3))
    start = {key: np.asarray(value) for key, value in trainer.weights.items()}
    batch = next(trainer.data)
    metrics = grpo_step(trainer, engine, [resolve_reward("asr_wer_reward")], batch, 1).metrics
    assert trainer.state.step == 2
    assert 0 < abs(metrics["policy_ratio/mean"] - 1) < 0.5
    assert metrics["kl"] > 1e-9
    for key, value in trainer.reference.weights.items():
        np.testing.assert_array_equal(value, start[key], err_msg=key)
    rollout = sampling.generate_completions(trainer, engine, batch, 2)
    groups, heard = learner_batch(trainer, batch, rollout, np.zeros((4, 2), np.float32))
    np.testing.assert_array_equal(groups.reference_log_probs, score(trainer, trainer.reference.weights, groups, heard))
    np.testing.assert_allclose(groups.old_log_probs[rollout.mask], rollout.log_probs[rollout.mask], atol=1e-4)
    assert np.abs(groups.reference_log_probs - groups.old_log_probs)[rollout.mask].max() > 1e-4
