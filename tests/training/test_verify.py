import copy
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.audio import audio_token_count
from audio_grpo.config import to_yaml
from audio_grpo.data import create_audio_data_iterator, stages, synthesize
from audio_grpo.errors import UserError
from audio_grpo.grpo import learner as learner_module
from audio_grpo.rewards import RewardFunction, resolve_reward
from audio_grpo.rollout.compiled import EnginePrograms
from audio_grpo.training.batches import audio_of
from audio_grpo.training.grpo_loop import setup_train_loop
from audio_grpo.training.learning import learner_batch
from audio_grpo.training.optimizer import create_optimizer
from audio_grpo.training.sampling import generate_completions
from audio_grpo.training.session import Session
from audio_grpo.training.verify import data, hearing, memory, practice, sampling, verify_run
from audio_grpo.training.verify.check import Finding, attempt, line
from audio_grpo.training.verify.checklist import checklist
from audio_grpo.types import Completion, RequestResult, SkippedRecords
from small_model import small_config

LINES = [
    "configuration loads",
    "batches have the right shapes",
    "audio is heard",
    "padding changes nothing",
    "completions are not empty",
    "sampler and learner agree",
    "rewards are finite",
    "audio tower learns only if configured",
    "loss is finite",
    "loss changes",
    "weights change unless frozen",
    "memory suffices",
    "audio tower can learn",
]
STEPS_TAKEN = {"loss is finite", "loss changes", "weights change unless frozen"}
WER = [resolve_reward("asr_wer_reward")]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    synthesize(folder / "tones", "tones", count=8)
    return small_config(
        vocab_size=1024,
        tokenizer_path="audio-grpo/tiny",
        template="transcript",
        instruction="Transcribe.",
        reward_functions=["asr_wer_reward"],
        grain_train_files=str(folder / "tones"),
        base_output_directory=str(folder / "runs"),
        audio_max_seconds=3.0,
        max_prefill_predict_length=64,
        max_target_length=80,
        per_device_batch_size=1,
        warmup_steps_fraction=0.0,
        learning_rate=1e-3,
    )


@pytest.fixture(scope="module")
def built(config):
    trainer, engine = setup_train_loop(config)
    batch = next(trainer.data)
    rollout = generate_completions(trainer, engine, batch, 1)
    learned = learner_batch(trainer, batch, rollout, practice.made_up_advantages(4, 3))
    yield SimpleNamespace(trainer=trainer, engine=engine, batch=batch, rollout=rollout, learned=learned)
    trainer.data.close()


@pytest.fixture
def trainer(built):
    """At its start, whatever steps another test has taken: updates donate the state's buffers."""
    return replace(built.trainer, state=jax.tree.map(jnp.copy, built.trainer.state))


def with_program(trainer, name, wrap):
    """The trainer with one of its learner's compiled programs wrapped, the others shared."""
    learner = copy.copy(trainer.learner)
    learner.__dict__[name] = wrap(getattr(trainer.learner, name))
    return replace(trainer, learner=learner)


def failed(checks):
    return {check.name for check in checks if not check.passed}


def told(checks):
    return "\n".join(f"{check.passed} {check.name}: {check.measured}" for check in checks)


def measured(checks, name):
    return next(check.measured for check in checks if check.name == name)


def test_a_healthy_run_passes_every_line(trainer, built):
    checks = checklist(trainer, built.engine, WER)
    assert [check.name for check in checks] == LINES
    assert not failed(checks), told(checks)
    assert all(any(character.isdigit() for character in check.measured) for check in checks)


@pytest.mark.slow
def test_a_healthy_run_with_every_kind_of_learning_in_half_precision_passes_too_and_writes_nothing(config, tmp_path):
    changes = {
        "num_experts": 4,
        "inject_transcript": True,
        "sft_coef": 0.1,
        "entropy_coef": 0.01,
        "freeze_audio_encoder_params": False,
        "dtype": "bfloat16",
        "weight_dtype": "bfloat16",
        "learning_rate_schedule": "cosine",
        "warmup_steps_fraction": 1.0,
        "base_output_directory": str(tmp_path / "runs"),
    }
    checks = verify_run(config.model_copy(update=changes))
    assert not failed(checks), told(checks)
    assert [check.name for check in checks] == LINES
    assert not (tmp_path / "runs").exists()


def test_a_run_without_data_is_the_users_fault(config):
    with pytest.raises(UserError, match="grain_train_files is not set"):
        verify_run(config.model_copy(update={"grain_train_files": None}))


def test_a_batch_that_does_not_divide_over_the_devices_is_the_users_fault(trainer, built):
    uneven = {name: values[:3] for name, values in built.batch.items()}
    with pytest.raises(UserError, match="A batch of 3 prompts does not divide over 4 devices"):
        checklist(replace(trainer, data=iter([uneven])), built.engine, WER)


def test_a_configuration_that_changes_when_it_is_written_fails(trainer, monkeypatch):
    monkeypatch.setattr(data, "to_yaml", lambda config: to_yaml(config).replace("\nseed: 0\n", "\nseed: 1\n"))
    finding = data.configuration_loads(trainer.session)
    assert finding == Finding(False, "changed by writing and loading the resolved configuration: seed")


def without(batch, name):
    return {key: value for key, value in batch.items() if key != name}


def altered(batch, name, index, value):
    array = batch[name].copy()
    array[index] = value
    return {**batch, name: array}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda b: without(b, "audios"), r"audios is NoneType, not float32\[4, 128, 300\]"),
        (lambda b: {**b, "ar": b["ar"][:, :-1]}, r"ar is int32\[4, 63\], not int32\[4, 64\]"),
        (lambda b: {**b, "audios": b["audios"].astype(np.float64)}, r"audios is float64\[4, 128, 300\], not float32"),
        (lambda b: {**b, "id": b["id"][:3]}, "id is list, not a list of 4"),
        (lambda b: altered(b, "ar_true_length", 0, 0), "ar_true_length has 0 to .*, not 1 to 64"),
        (lambda b: altered(b, "audios_true_length", 0, 301), "audios_true_length has .* to 301, not 1 to 300"),
        (lambda b: altered(b, "audios", (0, 0, 0), np.nan), "audios has values that are not finite"),
        (lambda b: altered(b, "audios", (0, 0, b["audios_true_length"][0]), 0.1), "tones/.* has features beyond its"),
        (lambda b: altered(b, "ar", (0, b["ar_true_length"][0]), 9), "tones/.* has tokens other than padding beyond"),
        (lambda b: {**b, "ground_truth_text": ["", *b["ground_truth_text"][1:]]}, "tones/.* has no ground_truth_text"),
    ],
)
def test_a_batch_with_a_fault_fails_and_says_which(trainer, built, spoil, sentence):
    assert data.batch_is_sound(trainer.session, built.batch, SkippedRecords()).passed
    finding = data.batch_is_sound(trainer.session, spoil(built.batch), SkippedRecords())
    assert not finding.passed
    assert re.search(sentence, finding.measured), finding.measured


def test_a_data_stage_that_miscounts_placeholders_fails(trainer, config, monkeypatch):
    monkeypatch.setattr(stages, "audio_token_count", lambda frames: audio_token_count(frames) + 1)
    iterator = create_audio_data_iterator(config, trainer.session.mesh)
    finding = data.batch_is_sound(trainer.session, next(iterator), iterator.skipped)
    iterator.close()
    assert not finding.passed
    assert len(re.findall(r"has (\d+) placeholders for \d+ audio tokens", finding.measured)) == 4


def test_left_out_records_are_told(trainer, built):
    skipped = SkippedRecords(seen=9, reasons={"too long": ["a", "b"], "no text": ["c"]})
    finding = data.batch_is_sound(trainer.session, built.batch, skipped)
    assert finding.measured.endswith("of the first 9 records 3 are left out, 2 × too long, 1 × no text")


def test_a_tower_that_ignores_audio_fails(trainer, built):
    def deaf(score):
        return lambda weights, groups, audio: score(weights, groups, audio._replace(features=audio.features * 0))

    finding = hearing.audio_is_heard(with_program(trainer, "score_program", deaf), built.batch)
    assert not finding.passed
    assert "by 0 to 0;" in finding.measured


def test_a_tower_that_hears_padding_fails(trainer, built):
    def leaking(score):
        def all_frames_real(weights, groups, audio):
            return score(weights, groups, audio._replace(frames=jnp.full_like(audio.frames, audio.features.shape[2])))

        return all_frames_real

    broken = with_program(trainer, "score_program", leaking)
    assert not hearing.padding_changes_nothing(broken, built.batch).passed
    assert hearing.audio_is_heard(broken, built.batch).passed


def test_an_engine_that_returns_nothing_fails_in_the_lines_that_need_completions(trainer, built):
    none = np.zeros(0, np.float32)
    nothing = Completion(token_ids=np.zeros(0, np.int32), logprobs=none, log_kept=none, finish_reason="length")
    engine = copy.copy(built.engine)
    results = [RequestResult(id=str(i), completions=(nothing,) * 3) for i in range(4)]
    engine.start = lambda *_, **__: enumerate(results)
    checks = checklist(trainer, engine, WER)
    assert {"completions are not empty", "sampler and learner agree"} <= failed(checks)
    assert measured(checks, "completions are not empty").startswith("12 completions of 0 to 0 tokens")
    assert not failed(checks) & {*LINES[:4], "rewards are finite", "memory suffices"}


def test_completions_without_text_fail(built):
    texts = [[" "] * 3] * 4
    assert sampling.completions_are_not_empty(built.rollout, [["one"] * 3] * 4).passed
    assert not sampling.completions_are_not_empty(built.rollout, texts).passed


def test_an_engine_with_another_temperature_than_the_learners_fails(trainer, built):
    engine = copy.copy(built.engine)
    engine.settings = replace(engine.settings, sampling=replace(engine.settings.sampling, temperature=0.8))
    engine._programs = EnginePrograms(engine.spec, engine.settings, engine.special, engine._mesh)
    rollout = generate_completions(trainer, engine, built.batch, 1)
    learned = learner_batch(trainer, built.batch, rollout, practice.made_up_advantages(4, 3))
    assert not sampling.sampler_and_learner_agree(trainer, *learned).passed
    assert sampling.sampler_and_learner_agree(trainer, *built.learned).passed


@pytest.mark.parametrize(("single", "everywhere", "passed"), [(0.4, 0.01, True), (0.6, 0, False), (0, 0.03, False)])
def test_in_bfloat16_single_tokens_may_differ_more_than_the_mean(trainer, built, single, everywhere, passed):
    trainer = replace(trainer, session=replace(trainer.session, spec=replace(trainer.session.spec, dtype="bfloat16")))
    groups, heard = built.learned
    shifted = groups.sampler_log_probs + np.float32(everywhere)
    shifted[0, 0, 0] += single
    finding = sampling.sampler_and_learner_agree(trainer, groups._replace(sampler_log_probs=shifted), heard)
    assert finding.passed == passed, finding
    assert not sampling.sampler_and_learner_agree(trainer, groups._replace(mask=groups.mask & False), heard).passed


def test_a_reward_that_is_nan_fails_with_the_lines_that_train_on_it(trainer, built):
    broken = RewardFunction("broken", lambda completions, **_: [math.nan] * len(completions))
    checks = checklist(trainer, built.engine, [broken])
    assert failed(checks) == {"rewards are finite", *STEPS_TAKEN}
    for name in ("rewards are finite", "loss is finite", "loss changes"):
        assert "UserError" in measured(checks, name)
        assert "The reward function broken returned nan for completion 0" in measured(checks, name)


def test_a_gradient_through_a_frozen_tower_fails(config, built, monkeypatch):
    monkeypatch.setattr(Session, "trainable", property(lambda session: frozenset(session.table)))
    trainer, _ = setup_train_loop(config)
    finding = hearing.tower_learns_only_if_configured(trainer, built.learned[0], audio_of(built.batch))
    trainer.data.close()
    assert not finding.passed
    assert finding.measured.startswith("gradients are taken for 29 frozen tensors of the tower, of norm ")


def test_a_tower_that_should_learn_but_gets_no_gradient_fails(trainer, built):
    learns = trainer.session.config.model_copy(update={"freeze_audio_encoder_params": False})
    trainer = replace(trainer, session=replace(trainer.session, config=learns))
    finding = hearing.tower_learns_only_if_configured(trainer, *built.learned)
    assert not finding.passed
    assert finding.measured.startswith(
        "of the tower's tensors that are not frozen, 1 of 29 have gradients; zero or not finite"
    )


def test_gradients_that_stop_before_the_tower_fail(trainer, built, monkeypatch):
    whole = learner_module.hear
    monkeypatch.setattr(learner_module, "hear", lambda *inputs: jax.lax.stop_gradient(whole(*inputs)))
    finding = hearing.tower_can_learn(trainer, built.batch, built.learned[0])
    assert not finding.passed
    assert "of norm 0 to 0" in finding.measured


def test_a_loss_that_is_nan_fails(trainer, built):
    def poisoned(gradients):
        def program(*inputs):
            taken, aux = gradients(*inputs)
            return taken, aux._replace(loss=jnp.nan * aux.loss)

        return program

    checks = checklist(with_program(trainer, "gradients_program", poisoned), built.engine, WER)
    assert "losses of 5 steps nan, nan, nan, nan, nan;" in measured(checks, "loss is finite")
    assert "loss is finite" in failed(checks)
    assert practice.loss_is_finite(practice.Practice([0.1, 0.2], [1.0, 1.0], 0)).passed
    assert not practice.loss_is_finite(practice.Practice([0.1, math.nan], [1.0, 1.0], 0)).passed
    assert not practice.loss_is_finite(practice.Practice([0.1, 0.2], [1.0, math.inf], 0)).passed


def test_an_optimizer_with_rate_zero_fails_in_loss_and_weights(config, trainer, built):
    learner = copy.copy(trainer.learner)
    learner._optimizer = create_optimizer(config.model_copy(update={"learning_rate": 0.0}))
    learner.__dict__.pop("apply_program", None)
    checks = checklist(replace(trainer, learner=learner), built.engine, WER)
    assert failed(checks) == {"loss changes", "weights change unless frozen"}
    assert measured(checks, "weights change unless frozen").startswith("0 of 14 tensors that learn changed")


def test_a_frozen_weight_that_changes_fails(trainer):
    before = practice.snapshot(trainer)
    key = "audio_tower.proj1.bias"
    learned = trainer.state._replace(trainable={name: value + 1e-3 for name, value in trainer.state.trainable.items()})
    good = practice.snapshot(replace(trainer, state=learned))
    assert practice.weights_change_unless_frozen(before, good).passed
    bad = practice.snapshot(
        replace(trainer, state=learned, frozen={**trainer.frozen, key: trainer.frozen[key].at[0].add(1e-7)})
    )
    finding = practice.weights_change_unless_frozen(before, bad)
    assert not finding.passed
    assert finding.measured.endswith(f"28 of 29 frozen ones are bit-equal; frozen but changed: {key}")


def test_equal_rewards_are_replaced_by_made_up_advantages_and_told(trainer, built):
    same = RewardFunction("same", lambda completions, **_: [1.0] * len(completions))
    checks = checklist(trainer, built.engine, [same])
    assert not failed(checks), told(checks)
    assert "in 5 of the steps all rewards of each group were equal" in measured(checks, "loss changes")
    np.testing.assert_array_equal(practice.made_up_advantages(2, 3), [[1, 0, -1], [1, 0, -1]])


def device(peak, limit):
    return SimpleNamespace(process_index=0, memory_stats=lambda: {"peak_bytes_in_use": peak, "bytes_limit": limit})


def test_memory_beyond_its_share_of_a_device_fails():
    uses = memory.memory_use([device(10 * 2**30, 32 * 2**30), device(31 * 2**30, 32 * 2**30)])
    finding = memory.memory_suffices(uses)
    assert not finding.passed
    assert "peak 31.00 GiB of 32.00 GiB, 96.9%" in finding.measured
    assert memory.memory_suffices(uses[:1]).passed


def test_where_devices_do_not_tell_the_process_is_measured():
    block = np.ones(2**27, np.uint8)
    (use,) = memory.memory_use(jax.devices())
    assert use.name == "this process"
    assert block.nbytes < use.peak < use.limit
    assert not memory.memory_suffices([use._replace(limit=use.peak)]).passed


def test_a_check_that_raises_has_failed_and_says_what_was_raised():
    def broken():
        error = ValueError("no such shape")
        error.add_note("Seen while testing.")
        raise error

    shared = attempt(broken)
    for check in (line("one", broken), line("two", shared.result)):
        assert not check.passed
        assert check.measured.startswith("raised ValueError in broken, ")
        assert check.measured.endswith(": no such shape Seen while testing.")
