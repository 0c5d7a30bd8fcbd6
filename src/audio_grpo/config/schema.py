"""Every configuration key: its type, its default and what it means.

The keys are flat and carry MaxText's names where MaxText has one and TRL's where it has not. This is the only place
that holds a default. `Config` is strict: an unknown key, a wrong type and a contradiction are all errors.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from audio_grpo.config.agreements import agreements

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Parallelism = Annotated[int, Field(ge=-1)]
"""Devices along one mesh axis; −1 takes all devices that the other axes leave."""
DTypeName = Literal["auto", "float32", "bfloat16"]
DecoderBlock = Literal["qwen3_omni", "qwen3_asr"]
Template = Literal["reasoning", "transcript", "qwen3-asr"]
NormalizerName = Literal[
    "none", "basic", "whisper-english", "whisper-basic", "arabic-leaderboard", "arabic-extended", "cjk"
]
LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo"]
Tag = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,  # error messages quote them
    )


class RunKeys(_Section):
    """Which run this is and where it writes."""

    run_name: str = "audio-grpo"
    """Folder below `base_output_directory` that holds the run."""
    base_output_directory: str = "runs"
    """Local folder or gs://, s3:// address."""
    steps: Positive = 100
    """Batches learned from; each is `num_iterations` optimizer steps."""
    seed: NonNegative = 0
    """Start of all randomness: weights, shuffling, sampling."""
    use_grpo: bool = True
    log_completions: NonNegative = 4
    """Sampled completions written to the run folder at every step."""
    enable_tensorboard: bool = True
    jax_cache_dir: str = "~/.cache/audio-grpo/jax"
    """Compiled programs are kept here between runs; empty for none."""


class DecoderKeys(_Section):
    """Shape of the text decoder."""

    model_name: str = "qwen3-omni-test"
    """Model preset, or a model file `NAME.yml` beside the configuration."""
    decoder_block: DecoderBlock = "qwen3_omni"
    """Family: which prompts, token ids and published tensor names apply."""
    num_decoder_layers: Positive = 2
    emb_dim: Positive = 256
    num_query_heads: Positive = 4
    num_kv_heads: Positive = 2
    head_dim: Positive = 64
    mlp_dim: Positive = 512
    """Width of the dense MLP; unused where there are experts."""
    num_experts: NonNegative = 0
    """0 for a dense decoder."""
    num_experts_per_tok: Positive = 8
    moe_mlp_dim: Positive = 768
    norm_topk_prob: bool = True
    """The chosen experts' weights are scaled to sum to one."""
    vocab_size: Positive = 152064
    logits_via_embedding: bool = False
    """The output head is the embedding (tied)."""
    rope_max_timescale: Annotated[float, Field(gt=0)] = 1_000_000.0
    normalization_layer_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    use_multimodal: bool = True
    use_audio: Literal[True] = True


class AudioTowerKeys(_Section):
    """Shape of the audio tower; a size left at None shrinks with the decoder (see `model.spec`)."""

    d_model_for_audio: Positive | None = None
    """Default: `emb_dim`."""
    encoder_layers_for_audio: Positive | None = None
    """Default: `num_decoder_layers`."""
    encoder_attention_heads_for_audio: Positive | None = None
    """Default: `num_query_heads`."""
    encoder_ffn_dim_for_audio: Positive | None = None
    """Default: four times `d_model_for_audio`."""
    downsample_hidden_size_for_audio: Positive | None = None
    """Channels of the convolutions. Default: a quarter of `d_model_for_audio`."""
    output_dim_for_audio: Positive | None = None
    """Must be `emb_dim`, its default."""
    num_mel_bins_for_audio: Positive = 128
    n_window_for_audio: Positive = 50
    """Half the frames of one chunk."""
    n_window_infer_for_audio: Positive = 800
    """Frames of one attention window."""


class FreezeKeys(_Section):
    """What training leaves as it is."""

    freeze_audio_encoder_params: bool = True
    """The audio tower up to its projector."""
    freeze_projector_params: bool | None = None
    """The tower's last two maps, into the decoder's width; null does what `freeze_audio_encoder_params` does."""
    freeze_vision_encoder_params: Literal[True] = True
    """The vision encoder is carried over into exports and never run."""
    freeze_router_params: bool = True
    """What chooses experts, where there are any."""
    freeze_embedding_params: bool = False
    """The embedding of tokens and the output head."""
    freeze_patterns: list[str] = []
    """Further weights, by patterns of published names with * for indices."""


class LoraKeys(_Section):
    """Low-rank adapters: the only weights that learn where there are any."""

    lora_rank: NonNegative = 0
    """0 trains the weights themselves."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapters' product is multiplied by `lora_alpha` / `lora_rank`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of its input features that each adapter leaves out in a forward and backward pass, drawn anew for each;
    sampling and scoring use all."""
    lora_target_modules: list[str] = ["model.layers.*.self_attn.*_proj"]
    """Patterns of published names, with * for indices; `*.mlp.experts.*_proj` gives each expert adapters of its own."""


class PromptKeys(_Section):
    """The conversation around a clip, and its tokens."""

    tokenizer_type: Literal["huggingface"] = "huggingface"
    tokenizer_path: str = "Qwen/Qwen3-Omni-30B-A3B-Instruct"
    """Folder with tokenizer.json, a hub name, or "audio-grpo/tiny"."""
    template: Template = "reasoning"
    """What the model is to answer: tagged reasoning and answer, the bare transcript, or `language X<asr_text>…`."""
    instruction: str | None = None
    """Text after the clip; {language} is filled in. None takes the template's own."""
    language: str | None = None
    """English name used where a record states none."""
    reasoning_start_token: Tag = "<reasoning>"
    reasoning_end_token: Tag = "</reasoning>"
    solution_start_token: Tag = "<answer>"
    solution_end_token: Tag = "</answer>"
    add_bos: Literal[False] = False
    """The Qwen3 family has no beginning-of-sequence token."""
    add_eos: Literal[False] = False
    """A prompt that ends its own turn could not be answered."""


class DataKeys(_Section):
    """Which clips, and how they are read."""

    dataset_type: Literal["grain"] = "grain"
    grain_file_type: Literal["arrayrecord"] = "arrayrecord"
    grain_train_files: str | None = None
    """A folder of ArrayRecord files, one file, or a glob."""
    grain_eval_files: str | None = None
    train_data_columns: str | list[str] = "ar"
    """The first names the batch's prompt column."""
    grain_worker_count: NonNegative = 0
    """Processes that decode audio; 0 decodes in threads."""
    max_prefill_predict_length: Positive = 128
    """Tokens of the longest prompt, the clip's included."""
    max_target_length: Positive = 256
    """Tokens of the longest prompt and its completion together."""
    audio_min_seconds: Annotated[float, Field(ge=0)] = 0.1
    audio_max_seconds: Annotated[float, Field(gt=0)] = 30.0
    max_skipped_fraction: Fraction = 0.05
    """The run stops when more than this share of the records it looked at is unusable."""
    text_normalizer: NormalizerName = "basic"
    """Applied to references and hypotheses alike, in rewards and evaluation."""


class RewardKeys(_Section):
    """What an answer is worth."""

    reward_functions: list[str] = ["asr_wer_reward", "asr_format_reward"]
    """Built-in names, `module:function` or `file.py:function`."""
    reward_weights: list[float] | None = None
    """One for each function; None weighs them equally with 1."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Whether the weighted rewards' sum becomes advantages, or each reward does for itself and these are summed."""
    soft_punish_cache: NonNegative = 0
    """The reward `soft_overlong_punishment_reward` falls from 0 to -1 over this many tokens before the largest length
    of a completion."""
    reward_exact_format_match: float = 3.0
    asr_reward_cap: Annotated[float, Field(gt=0)] = 2.0
    asr_exact_match_bonus: float = 3.0
    asr_format_bonus: float = 1.0
    asr_no_answer_penalty: float = -2.0


class RolloutKeys(_Section):
    """How answers are sampled."""

    num_generations: Positive = 8
    """Completions for each prompt, G."""
    decode_sampling_strategy: Literal["greedy", "weighted"] = "weighted"
    decode_sampling_temperature: Annotated[float, Field(gt=0)] = 1.0
    decode_sampling_top_k: NonNegative = 0
    """Draw from the k likeliest tokens; 0 draws from all."""
    decode_sampling_nucleus_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    decode_sampling_min_p: Fraction = 0.0
    """Draw from the tokens that have at least this share of the likeliest token's probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of tokens that a sequence already has, if positive, and multiplies them if negative. Like
    top-k, nucleus and min-p it changes what is drawn but not the log-probabilities that are reported and learned."""
    min_completion_length: NonNegative = 0
    """Tokens of a completion before it may stop."""
    stop_strings: list[str] = []
    """Any of these ends a completion, with the token that completes it, as stop tokens do."""
    return_log_prob: Literal[True] = True
    """The engine always reports them: the learner is checked against them."""
    max_slots: Positive = 64
    """Completions that decode at the same time."""
    decode_burst: Positive = 16
    """Tokens decoded in one dispatch before the host looks for finished completions."""
    audio_store_gib: Annotated[float, Field(ge=0)] = 0.0
    """While the audio tower is frozen, clips' embeddings are kept for later epochs, as many as this holds, by runs of
    one process. A resumed run hears clips in other company than an uninterrupted one would: it then equals it up to
    rounding, and not bit for bit."""
    audio_store_path: str | None = None
    """A local folder to keep them in, which serves later runs too; null keeps them in the host's memory."""
    inference_rollouts: Literal[1] = 1
    """Rollout and learning share their weights, so every rollout uses the newest, but for `sample_ahead`."""
    inference_devices_per_replica: Positive | None = None
    """Times `inference_replicas`: devices that only sample, while the others only learn; they take turns, unless
    `sample_ahead` is set. Where the product is all devices or more, or this is null, every device does both.
    Supervised training and evaluation have no use for it."""
    inference_replicas: Positive = 1
    """Copies of the weights on the devices that only sample; each is cut over `inference_devices_per_replica`."""
    sample_ahead: bool = False
    """The next batch is sampled while this one is learned, from the weights of before (see docs/losses.md). One
    process whose devices do not all do both, or that has one device, can do so."""


class GrpoKeys(_Section):
    """The policy loss."""

    grpo_beta: Annotated[float, Field(ge=0)] = 0.04
    """Weight of the KL to the reference; 0 builds no reference."""
    reference_weight_dtype: Literal["float32", "bfloat16"] | None = None
    """In which the reference keeps its copy of what learns; null is `weight_dtype`."""
    reference_offload: bool = False
    """That copy lies in the host's memory, and on the devices only while it scores."""
    grpo_epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Half-width of the clipped ratio's interval."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """The interval's upper half-width where it differs; for `loss_type` cispo, the largest ratio itself."""
    delta: Annotated[float, Field(gt=0)] | None = None
    """Largest ratio, for negative advantages too."""
    loss_type: LossType = "grpo"
    """The policy's objective and how token losses are averaged (see docs/losses.md)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Each token's own ratio, or one for each sequence (GSPO)."""
    sapo_temperature_pos: Annotated[float, Field(gt=0)] = 1.0
    """Steepness of `loss_type` sapo's gate for positive advantages; a higher one lets less through."""
    sapo_temperature_neg: Annotated[float, Field(gt=0)] = 1.05
    """The same for the others."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the KL to the reference is estimated."""
    use_bias_correction_kl: bool = False
    """The KL estimate is multiplied by the ratio, so that its gradient is unbiased."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Which standard deviation divides the advantages."""
    use_leave_one_out_baseline: bool = False
    """A completion's reward is compared with the mean of the group's others (RLOO) instead of the group's."""
    mask_truncated_completions: bool = False
    """Completions that were cut off at their largest length count nothing in the loss."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus, the mean entropy at the sampled tokens."""
    inject_transcript: bool = False
    """Each group has its clip's transcript as one more completion, which earns rewards as the sampled ones do."""
    sft_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the transcripts' mean cross-entropy, which is added to the loss."""
    importance_sampling_correction: bool = False
    """The loss is weighted by the ratio of the learner's probabilities to those that the engine reported."""
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """Whose ratio that is, and whether one outside the bounds is moved to the nearest or weighs nothing."""
    importance_sampling_clip_max: Annotated[float, Field(gt=0)] | None = 3.0
    importance_sampling_clip_min: Annotated[float, Field(gt=0)] | None = None
    off_policy_mask_threshold: Annotated[float, Field(gt=0)] | None = None
    """Sequences of negative advantage count nothing where their mean log-probability has fallen by more nats than
    this since they were sampled."""
    num_iterations: Positive = 1
    """Updates on each batch of completions, μ."""
    router_replay: bool = False
    """The learner and the reference send each token to the experts that it went to while it was sampled (R3)."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss that evens out how many tokens each expert gets (see docs/experts.md)."""


class DynamicSamplingKeys(_Section):
    """What becomes of groups whose rewards are all equal, which teach nothing."""

    dynamic_sampling_max_rounds: NonNegative = 0
    """Further batches of prompts that a step samples at most, whose groups take the places of such groups; 0 leaves
    them."""
    zero_std_skip_after: Positive = 2
    """A clip whose groups were all such, so many times in a row up to the last one, may be passed over."""
    zero_std_skip_probability: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """How likely it then is when its turn comes; 0 never passes over a clip."""


class OptimizerKeys(_Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up."""
    cosine_learning_rate_final_fraction: Fraction = 0.1
    """Share of `learning_rate` that linear and cosine schedules end at."""
    warmup_steps_fraction: Fraction = 0.1
    """Share of `steps` in which the rate rises from 0."""
    adam_b1: Fraction = 0.9
    adam_b2: Fraction = 0.99
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    adam_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the moving average of gradients is kept between updates."""
    nu_dtype: Literal["float32", "bfloat16"] = "float32"
    """The same of squared gradients (see docs/what_learns.md)."""
    gradient_clipping_threshold: Annotated[float, Field(ge=0)] = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    max_skipped_updates: NonNegative = 5
    """Updates that are skipped one after another for a NaN or an infinity, at most: one more ends the run."""


class BatchKeys(_Section):
    """How much is learned from at once."""

    per_device_batch_size: Annotated[float, Field(gt=0)] = 2
    """Prompts per device that learns in one forward and backward pass; a fraction where tensor parallelism shares
    prompts. Times those devices and `gradient_accumulation_steps`, it is the prompts of a step."""
    gradient_accumulation_steps: Positive = 1
    enable_dropout: Literal[False] = False
    """The published models have none."""
    remat_policy: Literal["full", "none"] = "full"
    """"full" recomputes each layer in the backward pass."""
    logits_chunk_mib: Positive = 128
    """Memory that logits may take on a device while gradients are made, in MiB: as many whole completions as fit go
    through the vocabulary together, or one where it takes more."""


class PrecisionKeys(_Section):
    """Number formats; "auto" is float32 on CPU and bfloat16 on accelerators."""

    dtype: DTypeName = "auto"
    """Activations and matrix products."""
    weight_dtype: DTypeName = "auto"
    """Stored weights. Trained weights below float32 have a float32 master copy in the optimizer."""
    attention: Literal["autoselected", "dot_product", "flash"] = "autoselected"
    """"flash" holds no scores in prefill and learning, on TPU; "autoselected" takes it where it can."""


class ParallelismKeys(_Section):
    """The device mesh: `ici_*` within a slice, `dcn_*` across slices; one of each may be −1, which fills in."""

    ici_data_parallelism: Parallelism = 1
    ici_fsdp_parallelism: Parallelism = -1
    ici_tensor_parallelism: Parallelism = 1
    ici_expert_parallelism: Parallelism = 1
    dcn_data_parallelism: Parallelism = -1
    """Slices are those of a TPU; elsewhere, where a `dcn_*` key exceeds 1, each process is one."""
    dcn_fsdp_parallelism: Parallelism = 1
    dcn_tensor_parallelism: Parallelism = 1
    dcn_expert_parallelism: Parallelism = 1


class CheckpointKeys(_Section):
    """Where weights come from and when they are kept."""

    load_parameters_path: str | None = None
    """A published-layout folder or a run of ours to start from; None draws random weights."""
    enable_checkpointing: bool = True
    checkpoint_period: Positive = 100
    """Steps between checkpoints; the last step always has one."""
    max_num_checkpoints_to_keep: Positive = 2
    async_checkpointing: bool = True


class EvaluationKeys(_Section):
    """Corpus WER and CER on `grain_eval_files`."""

    eval_interval: Annotated[int, Field(ge=-1)] = -1
    """Steps between evaluations during training; −1 for none."""
    eval_max_clips: NonNegative = 0
    """Clips looked at; 0 for all."""


class Config(
    RunKeys,
    DecoderKeys,
    AudioTowerKeys,
    FreezeKeys,
    LoraKeys,
    PromptKeys,
    DataKeys,
    RewardKeys,
    RolloutKeys,
    GrpoKeys,
    DynamicSamplingKeys,
    OptimizerKeys,
    BatchKeys,
    PrecisionKeys,
    ParallelismKeys,
    CheckpointKeys,
    EvaluationKeys,
):
    """A resolved configuration: every key has its value, and the values agree with each other."""

    @property
    def prompt_column(self) -> str:
        """Name of the batch's prompt tokens, e.g. "ar"."""
        columns = self.train_data_columns
        return columns if isinstance(columns, str) else columns[0]

    @property
    def max_completion_length(self) -> int:
        """C, the tokens that a completion may have."""
        return self.max_target_length - self.max_prefill_predict_length

    @property
    def learns_transcripts(self) -> bool:
        """Whether the learner is given each clip's transcript beside its completions."""
        return self.inject_transcript or self.sft_coef > 0

    @model_validator(mode="after")
    def _values_agree(self) -> Self:
        problems = [message for holds, message in agreements(self) if not holds]
        if problems:
            raise ValueError("\n".join(problems))
        return self
