"""What must hold between the values of several keys."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from audio_grpo.config.schema import Config

Agreement = tuple[bool, str]
"""Whether it holds, and a sentence for where it does not, which names the keys, their values and the remedy."""

_MESH_AXES = ("data", "fsdp", "tensor", "expert")

_LARGEST_BFLOAT16_DECAY = 0.996
"""A moving average in bfloat16 is rounded by up to 1/256 of itself, and must fall by more than that."""


def agreements(config: "Config") -> list[Agreement]:
    """All of them, those that hold too."""
    free_axes = {
        network: [key for axis in _MESH_AXES if getattr(config, key := f"{network}_{axis}_parallelism") == -1]
        for network in ("ici", "dcn")
    }
    tags = (
        config.reasoning_start_token,
        config.reasoning_end_token,
        config.solution_start_token,
        config.solution_end_token,
    )
    return [
        (
            config.max_prefill_predict_length < config.max_target_length,
            f"max_prefill_predict_length {config.max_prefill_predict_length} leaves no room for a completion in "
            f"max_target_length {config.max_target_length}: make max_target_length larger",
        ),
        (
            config.min_completion_length < max(config.max_completion_length, 1),
            f"min_completion_length {config.min_completion_length} leaves no room for a stop token in the "
            f"{config.max_completion_length} tokens that max_target_length leaves a completion: make it smaller",
        ),
        (
            config.lora_dropout == 0 or config.lora_rank > 0,
            f"lora_dropout {config.lora_dropout} has no adapters to act on: set lora_rank too, or leave it out",
        ),
        (
            config.num_query_heads % config.num_kv_heads == 0,
            f"num_query_heads {config.num_query_heads} is not a multiple of num_kv_heads {config.num_kv_heads}",
        ),
        (
            config.num_experts == 0 or config.num_experts_per_tok <= config.num_experts,
            f"num_experts_per_tok {config.num_experts_per_tok} exceeds num_experts {config.num_experts}",
        ),
        (
            config.num_experts > 0 or not config.router_replay,
            "router_replay has no experts to choose again: model_name has num_experts 0, so leave it out",
        ),
        (
            config.router_aux_loss_coef == 0 or (config.num_experts > 0 and not config.freeze_router_params),
            f"router_aux_loss_coef {config.router_aux_loss_coef} has no router to teach: num_experts is "
            f"{config.num_experts} and freeze_router_params {str(config.freeze_router_params).lower()}, so leave it "
            "out, or let the router of a model with experts learn",
        ),
        (
            config.output_dim_for_audio in (None, config.emb_dim),
            f"output_dim_for_audio {config.output_dim_for_audio} must equal emb_dim {config.emb_dim}: audio embeddings "
            "take the place of token embeddings",
        ),
        (
            not (config.use_grpo and config.num_generations == 1),
            "num_generations 1 gives every completion the advantage 0: GRPO needs at least 2",
        ),
        (
            not (config.use_grpo and config.decode_sampling_strategy == "greedy"),
            "decode_sampling_strategy greedy makes all completions of a prompt alike: GRPO needs weighted",
        ),
        (
            config.reward_weights is None or len(config.reward_weights) == len(config.reward_functions),
            f"reward_weights has {len(config.reward_weights or [])} entries for {len(config.reward_functions)} "
            "reward_functions: give one for each",
        ),
        (
            config.inference_replicas == 1 or config.inference_devices_per_replica is not None,
            f"inference_replicas {config.inference_replicas} needs inference_devices_per_replica: give the number of "
            "devices that share one replica's weights",
        ),
        (
            config.audio_min_seconds <= config.audio_max_seconds,
            f"audio_min_seconds {config.audio_min_seconds} exceeds audio_max_seconds {config.audio_max_seconds}",
        ),
        *(
            (len(free) <= 1, f"{', '.join(free)} are all -1: only one can take the devices that are left")
            for free in free_axes.values()
        ),
        (
            len(set(tags)) == len(tags),
            f"reasoning_start_token, reasoning_end_token, solution_start_token and solution_end_token are {tags}: "
            "make them four different texts",
        ),
        (
            len(config.train_data_columns) > 0,
            "train_data_columns is empty: name the prompt column, for example 'ar'",
        ),
        *(
            (
                dtype == "float32" or decay <= _LARGEST_BFLOAT16_DECAY,
                f"{moment}_dtype bfloat16 keeps 8 binary digits, in which an average that moves by "
                f"1 - {key} = {1 - decay:g} of itself never falls: set {key} to {_LARGEST_BFLOAT16_DECAY} or less, "
                f"or {moment}_dtype to float32",
            )
            for moment, dtype, key, decay in (
                ("mu", config.mu_dtype, "adam_b1", config.adam_b1),
                ("nu", config.nu_dtype, "adam_b2", config.adam_b2),
            )
        ),
        *_of_learning(config),
    ]


def _of_learning(config: "Config") -> list[Agreement]:
    """Those of the loss and the advantages."""
    clips = config.loss_type not in ("cispo", "sapo")
    upper = 1 + (config.grpo_epsilon if config.epsilon_high is None else config.epsilon_high)
    clip_min, clip_max = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    separate = config.multi_objective_aggregation == "normalize_then_sum"
    overlong = "soft_overlong_punishment_reward" in config.reward_functions
    return [
        (
            config.loss_type != "cispo" or (config.epsilon_high or 0) >= 1,
            f"loss_type cispo takes epsilon_high for the largest ratio itself, which is {config.epsilon_high}: give "
            "1 or more, for example 5.0",
        ),
        (
            config.loss_type != "sapo" or config.epsilon_high is None,
            f"epsilon_high {config.epsilon_high} has nothing to clip with loss_type sapo: leave it out, or change "
            "sapo_temperature_pos and sapo_temperature_neg",
        ),
        (
            config.delta is None or clips,
            f"delta {config.delta} has nothing to cap with loss_type {config.loss_type}: leave it out, or take grpo, "
            "bnpo, dapo or dr_grpo",
        ),
        (
            config.delta is None or not clips or config.delta > upper,
            f"delta {config.delta} is not above {upper:g}, where the ratio is clipped: make it larger",
        ),
        (
            clip_min is None or clip_max is None or clip_min < clip_max,
            f"importance_sampling_clip_min {clip_min} is not below importance_sampling_clip_max {clip_max}",
        ),
        (
            not config.importance_sampling_correction or (clip_min, clip_max) != (None, None),
            "importance_sampling_correction needs importance_sampling_clip_max or importance_sampling_clip_min: "
            "both are null",
        ),
        (
            not config.sample_ahead or config.importance_sampling_correction,
            "sample_ahead learns from completions of earlier weights as if they were of the newest: set "
            "importance_sampling_correction to true, which weighs them for it, or leave sample_ahead out",
        ),
        (
            not (config.sample_ahead and config.enable_checkpointing and config.checkpoint_period == 1),
            "checkpoint_period 1 leaves sample_ahead nothing to do, since what follows a checkpoint is sampled from "
            "the weights that it keeps: make checkpoint_period larger, or leave sample_ahead out",
        ),
        (
            not separate or config.scale_rewards == "group",
            f"scale_rewards {config.scale_rewards} contradicts multi_objective_aggregation normalize_then_sum, which "
            "scales each reward by its group's deviation: leave it at group",
        ),
        (
            not (separate and config.use_leave_one_out_baseline),
            "use_leave_one_out_baseline has no effect with multi_objective_aggregation normalize_then_sum, which "
            "scales advantages in the end: leave one of them out",
        ),
        (
            overlong == (config.soft_punish_cache > 0),
            f"soft_punish_cache {config.soft_punish_cache} and reward_functions "
            f"{'with' if overlong else 'without'} soft_overlong_punishment_reward: give both or neither",
        ),
        (
            config.soft_punish_cache <= max(config.max_completion_length, 1),
            f"soft_punish_cache {config.soft_punish_cache} exceeds the {config.max_completion_length} tokens that "
            "max_target_length leaves a completion: make it smaller",
        ),
    ]
