"""Every setting of fine-tuning, beside those of `config` that it shares with pretraining.

Defaults are those of https://github.com/stanford-crfm/BioMedLM/tree/main/finetune where it gives a number.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from biomedlm_jax.config import MeshConfig, ModelConfig, Paths, RunConfig, require, require_each, require_whole_parts

MULTIPLE_CHOICE = ("medqa", "medmcqa", "mmlu")
CLASSIFICATION = ("pubmedqa", "bioasq")
GENERATION = ("generation",)
# Lengths of rows are rounded up to multiples of this, so that few programs are compiled.
LENGTH_MULTIPLE = 128
Name = Literal["medqa", "medmcqa", "mmlu", "pubmedqa", "bioasq", "generation"]


@dataclass(frozen=True)
class TaskConfig:
    """The questions, and how they become rows of tokens."""

    name: Name = "medqa"
    """What the files hold: multiple choice (medqa, medmcqa, mmlu), classification (pubmedqa, bioasq), or texts to be
    written from others (generation)."""
    train_files: Paths = ()
    """Paths, globs or URLs of training examples, as their authors publish them."""
    eval_files: Paths = ()
    """Paths, globs or URLs of the dev set, by which the best checkpoint is chosen; none keeps the last one."""
    max_length: int = 512
    """Tokens of a question with one of its choices, or with its context; longer ones are cut."""
    truncation_side: Literal["right", "left"] = "right"
    """Which end of longer ones is cut; right, as BioMedLM's code does, cuts what stands last: choice or question."""
    max_source_length: int = 510
    """Of task generation: tokens of a source; longer ones are cut."""
    max_target_length: int = 510
    """Of task generation: tokens of a target without its end of text; longer ones are cut."""

    def __post_init__(self) -> None:
        for name, least in (("max_length", 8), ("max_source_length", 1), ("max_target_length", 1)):
            require(getattr(self, name) >= least, f"task.{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def longest(self) -> int:
        """Tokens of the longest rows, with their special tokens."""
        if self.name in GENERATION:
            return self.max_source_length + self.max_target_length + 2
        return self.max_length


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation: products of two thin matrices are trained beside frozen weights."""

    rank: int = 0
    """Rank of what is added to the matrices; 0 trains all weights instead."""
    alpha: float = 16.0
    """What is added is multiplied by alpha / rank."""
    modules: tuple[Literal["c_attn", "c_proj", "c_fc"], ...] = ("c_attn", "c_proj", "c_fc")
    """Which matrices of a block get it; c_proj is attention's and the MLP's."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank must not be negative, not {self.rank}")
        require(0 < self.alpha < math.inf, f"lora.alpha must be above 0, not {self.alpha}")
        require(bool(self.modules), "lora.modules is empty: there would be nothing to train")

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class FinetuneOptimizerConfig:
    """AdamW under linear warm-up and linear decay to 0."""

    learning_rate: float = 2e-6
    """Peak learning rate; the paper's are 2e-6 and 5e-6, LoRA takes some hundred times as much."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Weight decay, as of torch's and optax's AdamW."""
    warmup_fraction: float = 0.5
    """Part of all steps in which the rate rises from 0."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 never clips."""

    def __post_init__(self) -> None:
        require_each(self, "optimizer", "be above 0", "learning_rate", "eps")
        require_each(self, "optimizer", "be in [0, 1)", "beta1", "beta2", "warmup_fraction")
        require_each(self, "optimizer", "not be negative", "weight_decay", "clip_norm")


@dataclass(frozen=True)
class FinetuneTrainConfig:
    """Length, batch, and rhythm of fine-tuning."""

    epochs: int = 10
    """Passes over the training examples; the learning-rate schedule ends with them."""
    steps: int = 0
    """Optimizer steps instead of train.epochs, if not 0."""
    global_batch_size: int = 16
    """Examples a step, over all devices; a question of multiple choice is one, with all of its choices."""
    gradient_accumulation_steps: int = 1
    """Parts the global batch is computed in, one after the other, to save memory; the result is the same."""
    seed: int = 0
    """Seed of the new weights, of the order of examples, and of dropout."""
    loss_chunk: int = 0
    """Of task generation: positions of a row whose logits exist at once, to save memory; must divide 128; 0 is all."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations on the dev set, and between checkpoints; 0 is an epoch."""
    patience: int = 0
    """Ends after so many evaluations in a row that were no better than the best one; 0 goes on to the end."""
    profile_steps: int = 0
    """Steps of each start to profile, from its third on, into the run's folder; 0 profiles none."""

    def __post_init__(self) -> None:
        require_each(
            self, "train", "be at least 1", "epochs", "global_batch_size", "gradient_accumulation_steps", "log_every"
        )
        require_each(
            self, "train", "not be negative", "steps", "seed", "loss_chunk", "eval_every", "patience", "profile_steps"
        )
        require_whole_parts(self)


# The dropout of BioMedLM's published configuration, which Hugging Face's trainer puts to use.
_PUBLISHED_DROPOUT: dict[str, Any] = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}


@dataclass(frozen=True)
class FinetuneConfig:
    """All settings of fine-tuning. The sizes under model are by default those of run.init_from."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(**_PUBLISHED_DROPOUT))
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        longest = self.task.longest
        parts = "max_source_length + max_target_length + 2" if self.task.name in GENERATION else "max_length"
        require(
            longest <= self.model.n_positions,
            f"task.{parts} is {longest}, and the model reads {self.model.n_positions} tokens: shorten them",
        )
        chunk = self.train.loss_chunk
        require(
            not chunk or (LENGTH_MULTIPLE % chunk == 0 and self.model.n_positions % chunk == 0),
            f"train.loss_chunk must divide {LENGTH_MULTIPLE}, of which rows are multiples, and model.n_positions: "
            f"it is {chunk}",
        )

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The special tokens that the task adds to the vocabulary, in the order of their ids."""
        if self.task.name in MULTIPLE_CHOICE:
            return ("[PAD]", "[CLS]", "[SEP]")
        return ("<|startoftext|>",) if self.task.name in GENERATION else ()


def resolve_steps(config: FinetuneConfig, examples: int) -> FinetuneConfig:
    """The configuration with `train.steps` and `train.eval_every` in steps, for so many training examples."""
    per_epoch = -(-examples // config.train.global_batch_size)
    steps = config.train.steps or config.train.epochs * per_epoch
    every = config.train.eval_every or per_epoch
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps, eval_every=every))
