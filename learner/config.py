"""Everything that can be set about a learner: `LearnerConfig`, with `LoraConfig` and `EmaConfig` in it.

Plain dataclasses, checked when they are made: a wrong value stops the run before a model loads. The defaults train the
2 M parameter starter student on one CPU core; a large student on GPUs wants `zero_stage`, `precision="bf16"`,
`gradient_checkpointing` and perhaps `lora`.

Example::

    LearnerConfig(model_path="learner/base_student/checkpoint", output_dir="runs/a/learner", max_tokens=3_000_000)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "autocast", "bf16"]
Batching = Literal["auto", "bucketed", "packed"]
OptimizerName = Literal["muon", "adamw"]
ScheduleName = Literal["linear", "cosine", "constant", "wsd"]
Offload = Literal["none", "optimizer", "all"]


class ConfigError(ValueError):
    """A setting that cannot work; the message names the value and what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) instead of full training."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target: str = "all-linear"
    """"all-linear", or a comma-separated list of module names such as "q_proj,v_proj"."""
    quantization: Literal["none", "nf4"] = "none"
    """"nf4": the frozen weights in 4 bits (QLoRA, arXiv 2305.14314); needs a GPU and the package bitsandbytes."""
    export: Literal["merged", "adapter", "both"] = "merged"
    """"merged": a student that stands alone; "adapter": a PEFT folder that needs its base; "both": the adapter in a
    folder `adapter/` inside the student's."""

    def __post_init__(self) -> None:
        _one_of("lora.quantization", self.quantization, ("none", "nf4"))
        _one_of("lora.export", self.export, ("merged", "adapter", "both"))
        _at_least("lora.rank", self.rank, 1)
        _check(self.alpha > 0, f"lora.alpha is {self.alpha}; it must be above 0")
        _check(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must be in [0, 1)")
        _check(bool(self.target.strip()), "lora.target is empty; use 'all-linear' or names such as 'q_proj,v_proj'")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """Where a run's numbers go; see `learner.tracking`. None leaves the machine unless wandb or mlflow is set."""

    jsonl: bool = True
    """`metrics.jsonl` in the learner's folder: one line a step."""
    console: bool = False
    """A line on the terminal every `console_every_s`: for a learner without a job that shows it."""
    console_every_s: float = 10.0
    tensorboard: bool = False
    """Event files in `tensorboard/` of the learner's folder; needs the package tensorboard."""
    wandb_project: str = ""
    """Weights & Biases; needs the package wandb. Its own variables (WANDB_MODE=offline, WANDB_ENTITY, ...) hold."""
    mlflow_experiment: str = ""
    """MLflow; needs the package mlflow. MLFLOW_TRACKING_URI says where; without it, a folder of this machine."""
    run_name: str = ""
    """What the run is called there; by default the name of the folder above the learner's."""
    every_steps: int = 1
    """Steps between two records."""

    def __post_init__(self) -> None:
        _check(self.console_every_s > 0, f"tracking.console_every_s is {self.console_every_s}; it must be above 0")
        _at_least("tracking.every_steps", self.every_steps, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaConfig:
    """An exponential moving average of the trained weights (Polyak averaging), kept in fp32 beside them."""

    decay: float = 0.999
    """Of the average per optimizer step; the first steps use (1 + n) / (10 + n) where that is less."""
    export: bool = True
    """Export the average instead of the last weights."""

    def __post_init__(self) -> None:
        _check(0 < self.decay < 1, f"ema.decay is {self.decay}; it must be above 0 and below 1, such as 0.999")


@dataclass(frozen=True, slots=True, kw_only=True)
class CurriculumConfig:
    """In which order each pass takes its rows: from simple to complex, as arXiv 2505.13820 does, or at random."""

    order: Literal["none", "ascending", "paced"] = "none"
    """"none": the stream as it comes, then shuffled passes; "ascending": the easiest first; "paced": drawn at random
    from the easiest so far, more and more of them (see `learner.row_order`). Every pass still has each row once."""
    by: Literal["steps", "length", "teacher_success", "student_success"] = "steps"
    """What makes a row hard: its turns, its tokens, or how rarely its task was solved (see `learner.difficulty`)."""
    rates: str = ""
    """For the last two: a ledger, such as that of an evaluation, or a JSON file of task id -> success rate. Empty: what
    the stream itself says of the teacher, from the second pass on."""
    window_rows: int = 0
    """First pass: rows that are waited for (at most `data_timeout_s`) and then taken in order, again and again; 0: as
    they come."""
    ordered_passes: int | None = None
    """So many passes are ordered, the stream's included, and shuffled ones follow; None: all."""
    start_share: float = 0.3
    """"paced": the share of rows, the easiest, that a pass begins with."""

    def __post_init__(self) -> None:
        _one_of("curriculum.order", self.order, ("none", "ascending", "paced"))
        _one_of("curriculum.by", self.by, ("steps", "length", "teacher_success", "student_success"))
        _at_least("curriculum.window_rows", self.window_rows, 0)
        _check(0 < self.start_share <= 1, f"curriculum.start_share is {self.start_share}; it must be in (0, 1]")
        if self.ordered_passes is not None:
            _at_least("curriculum.ordered_passes", self.ordered_passes, 1)
        if self.order == "none":
            return
        _check(
            bool(self.rates) or self.by != "student_success",
            "curriculum.by is 'student_success' without curriculum.rates; name the ledger of a student's evaluation",
        )
        _check(
            bool(self.rates) or self.by != "teacher_success" or not self.window_rows,
            f"curriculum.window_rows is {self.window_rows} but the stream's own success rates are known only after the "
            "first pass; name a ledger in curriculum.rates, or set window_rows to 0",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """One learner run. Raises `ConfigError`."""

    model_path: str
    """Folder (or hub name) of the student to start from: config, weights, tokenizer with chat template."""
    output_dir: str
    """The learner's own folder: `checkpoints/`, `student/` (the final export), `snapshots/<percent>/`."""

    # -- what is learned
    objective: str = "sft"
    """Name of a file in `learner/objectives`."""
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    """Option of that objective -> value, such as {"weights": "learned"} for "span"; its class says which there are."""
    scores: str = ""
    """Folder of a teacher's scores of the rows (`launch.score`), for objectives that compare with it; "" for none."""
    span_weights: Mapping[str, float] = field(default_factory=dict)
    """Span type ("thought", "code", "answer", "format") -> weight of its tokens in the loss; 1 where absent."""
    system_prompt: str | None = None
    """The student's own system prompt; "" for none; None keeps the trajectory's."""
    validation_share: float = 0.0
    """Share of tasks (by hash of the task id) that is held out and only measured."""
    validate_every_steps: int = 0
    """Measure what is held out after so many steps too; 0: at the end of each pass and of the run alone."""
    best_by: Literal["none", "validation_loss", "rollout_score"] = "none"
    """Keep the best student so far in `best/`: by validation loss, or by the score that rollouts on held-out tasks get
    (see `learner.model_selection`)."""
    score_every_steps: int = 0
    """best_by "rollout_score": steps between two students that are handed out to be scored."""
    score_timeout_s: float = 900.0
    """Longest wait for the last score at the end of the run."""
    final_student: Literal["last", "best"] = "last"
    """Which one `student/` holds at the end."""
    patience: int = 0
    """End the run after so many measurements in a row without a better one; 0 never does."""

    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)

    # -- for how long: exactly one of `epochs` and `max_tokens`
    epochs: int | None = None
    """Passes over the trajectories; the first is the stream itself."""
    max_tokens: int | None = None
    """Tokens to train on (all tokens of the rows, padding not counted), in as many passes as that takes."""
    expected_trajectories: int | None = None
    """How many the stream will bring, refused ones included; without it the schedule of `epochs` stands still during
    the first pass."""

    # -- optimizer
    optimizer: OptimizerName = "muon"
    """"muon": Muon on the layers' matrices, AdamW on embeddings, norms and biases; "adamw": AdamW on everything."""
    lr: float = 1.5e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 1.2e-3
    """Peak learning rate of Muon (scaled to AdamW's update size)."""
    muon_momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    """On matrices alone; embeddings, norms and biases are not decayed."""
    schedule: ScheduleName = "linear"
    """How the rate goes from the peak to `final_lr_fraction` of it over the run: "linear", "cosine", "constant" (it
    does not), "wsd" (it stays, and falls linearly over the last `decay_share`)."""
    warmup_steps: int = 60
    """Steps of linear warm-up, under every schedule."""
    final_lr_fraction: float = 0.02
    """Of the peak, at the end of the schedule; "constant" does not use it."""
    decay_share: float = 0.2
    """Share of the run over which "wsd" falls."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    max_skipped_steps: int = 10
    """A step whose gradient is not finite is skipped; at the n-th of a run it stops and names the rows."""
    ema: EmaConfig | None = None

    # -- batches
    tokens_per_step: int = 4096
    """Budget of one optimizer step over all ranks."""
    rows_per_step: int | None = None
    """Exactly so many trajectories a step instead of a budget of tokens."""
    micro_batch_tokens: int = 4096
    """Budget of one forward pass on one rank, padding included."""
    max_row_tokens: int = 1024
    """A longer trajectory is refused."""
    batching: Batching = "auto"
    """"bucketed": rows of similar length, padded; "packed": rows joined without padding; "auto": bucketed on CPU."""

    ahead_rows: int = 128
    """Rows that may wait in the learner; when there are more, the queue fills and the rollout waits."""

    # -- engine
    zero_stage: int = 0
    ranks: int = 1
    precision: Precision = "autocast"
    """"autocast": fp32 weights, bf16 products; "bf16": bf16 weights with fp32 masters; "fp32"."""
    offload: Offload = "none"
    """What waits in the CPU's memory instead of the GPU's: "optimizer" (its state and the fp32 masters; zero_stage 1 to
    3), "all" (the weights too; zero_stage 3)."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass instead of keeping them."""
    compile: bool = False
    """torch.compile the student's layers (needs a C++ compiler on CPU)."""
    threads: int = 1
    """CPU threads per rank."""
    lora: LoraConfig | None = None

    # -- keeping
    seed: int = 0
    checkpoint_every_steps: int = 0
    """0: no checkpoint but the last."""
    keep_checkpoints: int = 2
    resume: bool = True
    """Go on from the newest checkpoint in `output_dir` when there is one."""
    snapshot_at: tuple[float, ...] = ()
    """Fractions of the run after which the student is exported, e.g. (0.5,)."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    publish_every_steps: int = 0
    """Hand the weights to whoever acts with them after so many steps (see `learner.publish`); 0: never."""
    publish_tolerance: float = 2.0
    """Largest difference of one token's log-probability between learner and engine, twenty times what it may be on
    average: 2 is for bfloat16 on either side; 0.01 will do where both compute in float32."""
    keep_published: int = 2

    # -- telling
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    # -- waiting
    data_timeout_s: float = 600.0
    """Longest wait for the next trajectory before the run gives up."""
    collective_timeout_s: float = 120.0
    """Longest wait of one rank for another."""
    restarts: int = 2
    """How many times ranks that died (killed, out of memory, a lost node) are started again from the last
    checkpoint."""

    def __post_init__(self) -> None:
        _check(bool(self.model_path), "model_path is empty; name the folder of the student to start from")
        _check(bool(self.output_dir), "output_dir is empty; name the folder for checkpoints and the student")
        _check(
            (self.epochs is None) != (self.max_tokens is None),
            f"epochs is {self.epochs} and max_tokens is {self.max_tokens}; set exactly one of them",
        )
        if self.epochs is not None:
            _at_least("epochs", self.epochs, 1)
        if self.max_tokens is not None:
            _at_least("max_tokens", self.max_tokens, 1)
        if self.expected_trajectories is not None:
            _at_least("expected_trajectories", self.expected_trajectories, 1)
        _one_of("optimizer", self.optimizer, ("muon", "adamw"))
        _one_of("batching", self.batching, ("auto", "bucketed", "packed"))
        _one_of("precision", self.precision, ("fp32", "autocast", "bf16"))
        _one_of("export_dtype", self.export_dtype, ("float32", "bfloat16"))
        _one_of("zero_stage", self.zero_stage, (0, 1, 2, 3))
        _one_of("schedule", self.schedule, ("linear", "cosine", "constant", "wsd"))
        _one_of("offload", self.offload, ("none", "optimizer", "all"))
        for name in ("lr", "muon_lr", "data_timeout_s", "publish_tolerance", "collective_timeout_s"):
            _check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("validate_every_steps", "score_every_steps", "publish_every_steps", "patience", "restarts"):
            _at_least(name, getattr(self, name), 0)
        _check_selection(self)
        for name in ("warmup_steps", "checkpoint_every_steps", "weight_decay", "gradient_clipping"):
            _at_least(name, getattr(self, name), 0)
        for name in ("ranks", "threads", "keep_checkpoints", "keep_published", "max_skipped_steps"):
            _at_least(name, getattr(self, name), 1)
        if self.rows_per_step is not None:
            _at_least("rows_per_step", self.rows_per_step, 1)
        _at_least("ahead_rows", self.ahead_rows, 1)
        _at_least("max_row_tokens", self.max_row_tokens, 8)
        for name in ("tokens_per_step", "micro_batch_tokens"):
            _check(
                getattr(self, name) >= self.max_row_tokens,
                f"{name} is {getattr(self, name)}; it must be at least max_row_tokens, {self.max_row_tokens}",
            )
        _check(0 <= self.final_lr_fraction <= 1, f"final_lr_fraction is {self.final_lr_fraction}; it must be in [0, 1]")
        _check(0 < self.decay_share <= 1, f"decay_share is {self.decay_share}; it must be above 0 and at most 1")
        _check(0 <= self.muon_momentum < 1, f"muon_momentum is {self.muon_momentum}; it must be in [0, 1)")
        _check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas is {self.betas}; it must be two numbers in [0, 1)",
        )
        _check(0 <= self.validation_share < 1, f"validation_share is {self.validation_share}; it must be in [0, 1)")
        _check(
            all(0 < at < 1 for at in self.snapshot_at),
            f"snapshot_at is {self.snapshot_at}; each must be between 0 and 1 (the end is always exported)",
        )
        trained = ("thought", "code", "answer", "format")
        for name, weight in self.span_weights.items():
            _check(name in trained, f"span_weights names {name!r}; it is trained on {', '.join(trained)} alone")
            _check(weight >= 0, f"span_weights[{name!r}] is {weight}; it must not be negative")
        _check(
            self.span_weights.get("format", 1.0) > 0,
            "span_weights['format'] is 0, but stop tokens are of that type, and a student that is not trained on them "
            "never ends a turn; use a small weight, such as 0.1",
        )


def _check_selection(config: LearnerConfig) -> None:
    """What choosing a student needs."""
    _one_of("best_by", config.best_by, ("none", "validation_loss", "rollout_score"))
    _one_of("final_student", config.final_student, ("last", "best"))
    _check(config.score_timeout_s > 0, f"score_timeout_s is {config.score_timeout_s}; it must be above 0")
    measures = config.best_by != "none"
    for name, asked in (("final_student", config.final_student == "best"), ("patience", config.patience > 0)):
        _check(
            measures or not asked,
            f"{name} is {getattr(config, name)!r} with best_by 'none'; set best_by to 'validation_loss' or "
            "'rollout_score'",
        )
    for name, asked in (("best_by", measures), ("validate_every_steps", config.validate_every_steps > 0)):
        _check(
            config.validation_share > 0 or not asked,
            f"{name} is {getattr(config, name)!r} but nothing is held out; set validation_share, to 0.05 for instance",
        )
    _check(
        (config.best_by == "rollout_score") == (config.score_every_steps > 0),
        f"score_every_steps is {config.score_every_steps} with best_by {config.best_by!r}; best_by 'rollout_score' "
        "needs it, and nothing else does",
    )


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _at_least(name: str, value: float, least: float) -> None:
    _check(value >= least, f"{name} is {value}; it must be at least {least}")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    _check(value in allowed, f"{name} is {value!r}; use one of {', '.join(map(repr, allowed))}")
