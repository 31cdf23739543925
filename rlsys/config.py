"""The configuration of a run: closed, typed sections that a YAML file fills and `a.b=c` overrides change.

What a person writes is checked here once, completely, before anything starts; after that the values are trusted.
`rlsys.config_file` reads and writes the files, `rlsys.config_rules` has the rules between sections. Every field
documents itself: the string under it is what `rlsys config KEY` prints.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlsys.config_grpo import GrpoConfig
from rlsys.config_rules import broken_rules
from rlsys.config_section import (
    Float,
    Fraction,
    FractionBelowOne,
    Int,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)

# ---------------------------------------------------------------- what is learned


class VariantConsequenceTask(Section):
    """Made from the genetic code, no download: name the protein change that a single-nucleotide variant causes."""

    kind: Literal["variant_consequence"]
    train_problems: Positive = 20_000
    """Problems to train on (SFT and GRPO)."""
    validation_problems: Positive = 300
    """Problems for looking while training."""
    test_problems: Positive = 300
    """Problems of the reported evaluation; no window is shared between the splits."""
    window_codons: Annotated[Int, Field(ge=3, le=1001)] = 5
    """Codons in a window, an odd number: the variant's codon is the middle one."""

    misread_rate: Fraction = 0.0
    """Share of the training demonstrations that misread the alternative nucleotide and reason on from it, as traces
    written by a model or a person contain mistakes. Held-out problems have none."""

    @model_validator(mode="after")
    def _the_variant_codon_is_the_middle_one(self) -> VariantConsequenceTask:
        if self.window_codons % 2 == 0:
            raise ValueError(f"window_codons={self.window_codons} has no middle codon; use an odd number")
        return self


class KeggTask(Section):
    """KEGG disease pathways (BioReason): which disease does this allele contribute to?"""

    kind: Literal["kegg"]
    train: str
    """A JSONL or Parquet file, or a Hugging Face Hub name (`wanglab/kegg`), whose `train` split is read."""
    validation: str
    """The same for problems to look at while training (Hub: the `validation` split)."""
    test: str
    """The same for the reported evaluation (Hub: the `test` split)."""
    window_bp: Positive | None = None
    """Cut each sequence to this many base pairs, centred on the variant; null keeps it whole."""
    over_long: Literal["error", "drop"] = "error"
    """A problem whose prompt does not fit: stop and name it, or leave it out and count it."""


Task = Annotated[VariantConsequenceTask | KeggTask, Field(discriminator="kind")]


# ---------------------------------------------------------------- the models


class LoraConfig(Section):
    """Low-rank adapters on the language model (Hu et al. 2021); projector and markers are trained in full beside it."""

    rank: Positive = 16
    """Rank r of each adapter."""
    alpha: PositiveFloat = 32.0
    """Scale: the update is alpha / r * B A."""
    dropout: FractionBelowOne = 0.0
    """Dropout on the adapters' input. GRPO wants 0: the ratio to the behavior policy would be noisy otherwise."""


class TinyPolicy(Section):
    """A Qwen3-architecture language model that the project makes itself in seconds, for a CPU."""

    kind: Literal["tiny"]
    tokenizer: Literal["words", "bpe"] = "words"
    """`words`: one token for each word of the quickstart task; `bpe`: byte-level BPE trained on the task's texts."""
    vocabulary: Annotated[Int, Field(ge=300)] = 1024
    """Tokens of a `bpe` tokenizer; `words` has its own number."""
    hidden_size: Annotated[Int, Field(ge=32, multiple_of=32)] = 128
    """Width H."""
    layers: Positive = 4
    """Transformer blocks."""
    attention_heads: Positive = 4
    """Heads, each `hidden_size / attention_heads` wide, which must be a multiple of 32 for the engine's CPU kernels."""
    projector: Literal["mlp", "linear"] = "mlp"
    """How features become language-model rows: two layers with GELU, or one (as in BioReason)."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""


class PretrainedPolicy(Section):
    """A policy from disk: a directory that rlsys wrote, or any Qwen3-family checkpoint."""

    kind: Literal["pretrained"]
    path: str
    """The directory. A text-only checkpoint gets a fresh projector; one of ours brings its own."""
    projector: Literal["mlp", "linear"] = "mlp"
    """Kind of a fresh projector; a directory of ours keeps its own."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""


Policy = Annotated[TinyPolicy | PretrainedPolicy, Field(discriminator="kind")]


class TinyEncoder(Section):
    """A small ESM-family encoder with fixed random weights, made in a second; served as a real one would be."""

    kind: Literal["tiny"]


class EsmEncoder(Section):
    """An ESM-family Nucleotide Transformer (v1) directory."""

    kind: Literal["esm"]
    path: str
    """The directory: config.json, vocab.txt, weights."""
    layer: Int = -1
    """Which hidden state to use: -1 is the last."""


Encoder = Annotated[TinyEncoder | EsmEncoder, Field(discriminator="kind")]


# ---------------------------------------------------------------- the two kinds of training


class SftConfig(Section):
    """The warm start: imitate the demonstrations of the training split."""

    steps: Positive
    """Optimizer steps."""
    batch_size: Positive = 64
    """Demonstrations in a step."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    warmup_steps: NonNegative = 10
    """Steps of linear rise to the peak; constant after it."""


# ---------------------------------------------------------------- the roles


class LearnerConfig(Section):
    """The DeepSpeed learner."""

    ranks: Positive = 1
    """Data-parallel processes."""
    cpus: PositiveFloat = 1
    """CPU cores of each rank."""
    gpus: NonNegativeFloat = 0
    """GPUs of each rank: 0 or 1."""
    zero_stage: Literal[1, 2, 3] = 1
    """ZeRO stage: shards optimizer state (1), gradients too (2), weights too (3)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward and backward pass; rollout workers use the same."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    gradient_clipping: PositiveFloat = 1.0
    """Largest norm of the whole gradient."""
    micro_batch_tokens: Positive = 4096
    """Tokens in one forward and backward pass, at least the longest prompt with its completion; a group's prompt counts
    once. Gradients accumulate over the step's micro-batches."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class RolloutConfig(Section):
    """The vLLM rollout workers."""

    workers: Positive = 1
    """Engines."""
    cpus: PositiveFloat = 1
    """CPU cores of each worker."""
    gpus: NonNegativeFloat = 0
    """GPUs of each worker; more than 1 is tensor parallelism."""
    max_new_tokens: Positive = 64
    """Limit of a completion's length."""
    temperature: PositiveFloat = 1.0
    """Of training rollouts; the learner divides its logits by the same. Top-p and top-k stay off."""
    max_running: Positive = 256
    """Sequences that an engine decodes at once (vLLM's max_num_seqs)."""
    max_model_tokens: Positive = 2048
    """Longest prompt and completion together (vLLM's max_model_len)."""
    kv_cache_gb: PositiveFloat | None = 0.25
    """Memory of the KV cache; null lets vLLM take the GPU's free memory."""
    replacements: NonNegative = 3
    """Workers that may be lost and replaced before the run goes on with fewer. One is lost when its process dies, or
    does not answer within cluster.call_timeout_seconds; what it was writing is written anew by others."""


class EmbeddingConfig(Section):
    """The DNA-embedding service."""

    replicas: Positive = 1
    """Encoder processes; a sequence always goes to the same one, so that it is cached once."""
    cpus: PositiveFloat = 0.25
    """CPU cores of each replica."""
    gpus: NonNegativeFloat = 0
    """GPUs of each replica."""
    batch_size: Positive = 32
    """Sequences in one forward pass of the encoder, gathered across requests."""
    cache_gb: PositiveFloat = 1.0
    """Features kept in memory, least recently used out first."""


class RewardPartConfig(Section):
    """One named part of the reward."""

    kind: Literal["format", "answer", "allele", "amino_acid", "function"]
    """A shipped part, or `function` for your own."""
    function: str | None = None
    """Dotted path `package.module:name` of a function (problem, completion text) -> float; only with kind function."""
    weight: Float = 1.0
    """Its factor in the reward."""
    timeout_seconds: PositiveFloat = 5.0
    """Time limit of one call; what runs out is counted as timed out, never as 0."""

    @model_validator(mode="after")
    def _a_function_is_named_exactly_where_the_kind_asks_for_one(self) -> RewardPartConfig:
        if (self.kind == "function") != (self.function is not None):
            raise ValueError(
                f"kind={self.kind} with function={self.function}: a function is named by kind=function only"
            )
        return self


class ScoringConfig(Section):
    """The reward scorers, which run the parts in processes of their own."""

    scorers: Positive = 1
    """Scorer processes."""
    cpus: PositiveFloat = 0.25
    """CPU cores of each."""
    max_failed_fraction: Fraction = 0.2
    """Stop the run when more than this share of the recent trajectories could not be scored."""


class EvaluationConfig(Section):
    """The reported evaluation: before, after SFT, after GRPO."""

    problems: Positive = 300
    """How many problems of the test split."""
    samples: Positive = 4
    """Completions of each at the training temperature; one greedy completion is added."""
    before: bool = True
    """Evaluate the policy before the warm start too."""
    every_steps: Positive | None = None
    """Also evaluate the policy that GRPO begins with and then every so many steps, on validation problems and while
    training goes on; null for never."""
    interleaved_problems: Positive = 64
    """How many problems of the validation split such an evaluation takes, one sample and one greedy completion each."""


class CheckpointConfig(Section):
    """What is kept so that a run can go on after a crash."""

    every_steps: Positive = 25
    """GRPO steps between checkpoints; one is also written after SFT and at the end."""
    keep: Positive = 2
    """Checkpoints kept, the newest ones."""


class LoggingConfig(Section):
    """Where metrics go beside `metrics.jsonl` and the Ray dashboard."""

    wandb_project: str | None = None
    """Weights & Biases project; offline where no API key is set."""
    trajectories_per_step: NonNegative = 1
    """Readable trajectories written to `trajectories.jsonl` each step."""


class ClusterConfig(Section):
    """The Ray cluster."""

    dashboard: bool = True
    """Start the Ray dashboard with a local cluster."""
    start_timeout_seconds: PositiveFloat = 300.0
    """Deadline for a role to start: imports, model loading, compilation."""
    call_timeout_seconds: PositiveFloat = 600.0
    """Deadline of any single call to a role; what runs out names the role and the call."""
    wait_timeout_seconds: PositiveFloat = 3600.0
    """Deadline of a wait of the controller itself: the learner's for the groups of a step, a rollout's for a slot. To
    be longer than any healthy step."""


class Config(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its directory below `runs/`."""
    seed: NonNegative = 0
    """Of everything that is random."""
    task: Task
    """What is learned."""
    policy: Policy
    """The language model and its projector."""
    encoder: Encoder
    """The frozen DNA encoder."""
    sft: SftConfig | None = None
    """The warm start; null starts GRPO from the policy as it is."""
    grpo: GrpoConfig
    """The RL phase."""
    learner: LearnerConfig = LearnerConfig()
    """The learner's processes."""
    rollout: RolloutConfig = RolloutConfig()
    """The rollout workers' processes."""
    embedding: EmbeddingConfig = EmbeddingConfig()
    """The embedding service's processes."""
    rewards: dict[str, RewardPartConfig]
    """Named reward parts; the reward is their weighted sum."""
    scoring: ScoringConfig = ScoringConfig()
    """The scorers' processes."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The reported evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept."""
    logging: LoggingConfig = LoggingConfig()
    """Where metrics go."""
    cluster: ClusterConfig = ClusterConfig()
    """The Ray cluster."""

    @model_validator(mode="after")
    def _the_sections_agree(self) -> Config:
        if broken := broken_rules(self):
            raise ValueError("\n".join(broken))
        return self
