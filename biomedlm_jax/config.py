"""Every setting: frozen dataclasses, one YAML file, dotted overrides.

Defaults are the published BioMedLM 2.7B (https://huggingface.co/stanford-crfm/BioMedLM) where its card or
configuration gives a number. A field's docstring is its `--help` text.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml

from biomedlm_jax.errors import UserError
from biomedlm_jax.files import replace_file

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

# One path or glob, or several.
Paths = tuple[str, ...] | str


def as_paths(paths: Paths) -> tuple[str, ...]:
    """`paths` as a tuple: settings accept a bare string for a single path."""
    return (paths,) if isinstance(paths, str) else tuple(paths)


def require(condition: bool, message: str) -> None:
    """Raises: UserError: with the message, unless the condition holds."""
    if not condition:
        raise UserError(message)


# What a setting must be, by the words that a message has for it.
_BOUNDS: dict[str, Callable[[float], bool]] = {
    "be at least 1": lambda value: value >= 1,
    "be above 0": lambda value: value > 0,
    "not be negative": lambda value: value >= 0,
    "be in [0, 1)": lambda value: 0 <= value < 1,
}


def require_each(settings: Any, group: str, bound: str, *names: str) -> None:
    """Raises: UserError: one of a group's settings is not what it must be."""
    for name in names:
        value = getattr(settings, name)
        require(_BOUNDS[bound](value), f"{group}.{name} must {bound}, not {value}")


def require_whole_parts(train: Any) -> None:
    """Raises: UserError: a batch does not divide into the parts that it shall be computed in."""
    size, parts = train.global_batch_size, train.gradient_accumulation_steps
    require(
        size % parts == 0,
        f"train.gradient_accumulation_steps must divide train.global_batch_size: {size} / {parts} is not a whole "
        "number",
    )


@dataclass(frozen=True)
class ModelConfig:
    """GPT-2, with Hugging Face GPT-2's names."""

    vocab_size: int = 28_896
    """Words of the vocabulary; must be the tokenizer's."""
    n_positions: int = 1024
    """Tokens of a row, which is also the longest sequence the model can read."""
    n_embd: int = 2560
    """Width of the residual stream; the MLP is four times as wide."""
    n_layer: int = 32
    """Number of blocks."""
    n_head: int = 20
    """Attention heads; must divide n_embd."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in LayerNorm, whose statistics are float32."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights; residual projections get it divided by sqrt(2 * n_layer)."""
    scale_attn_by_inverse_layer_idx: bool = True
    """Divide the attention scores of layer i (from 0) by i + 1, as the published model does."""
    embd_pdrop: float = 0.0
    """Dropout rate after the embeddings."""
    attn_pdrop: float = 0.0
    """Dropout rate of attention probabilities; only attention: reference has it, and auto takes that then."""
    resid_pdrop: float = 0.0
    """Dropout rate of what each block adds to the residual stream."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and of matrix products; parameters and optimizer state are float32."""
    attention: Literal["auto", "flash", "cudnn", "reference"] = "auto"
    """Attention implementation; auto takes the first of flash (our kernels), cudnn and reference (O(n_positions^2)
    memory) that serves the device and the shapes, and logs it."""
    remat: Literal["none", "matmuls", "full"] = "none"
    """What the backward pass recomputes of a block: nothing, all but matrix products, or everything."""
    unroll: int = 1
    """Layers unrolled in a step of the scan over layers; n_layer unrolls all: slower to compile, faster on one GPU."""
    fp8: bool = False
    """Train with the four products of each block, and their gradients, in FP8 instead of bfloat16: NVIDIA Hopper and
    later. Parameters, checkpoints and exports are the same, and used in bfloat16."""

    def __post_init__(self) -> None:
        require_each(
            self, "model", "be at least 1", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "unroll"
        )
        require(self.n_positions >= 2, "model.n_positions must be at least 2: a row of one token predicts nothing")
        require_each(self, "model", "be above 0", "layer_norm_epsilon", "initializer_range")
        require(
            self.n_embd % self.n_head == 0,
            f"model.n_head must divide model.n_embd: {self.n_embd} / {self.n_head} is not a whole number",
        )
        require_each(self, "model", "be in [0, 1)", "embd_pdrop", "attn_pdrop", "resid_pdrop")
        require(
            not self.attn_pdrop or self.attention in ("auto", "reference"),
            f"model.attention: {self.attention} has no dropout of attention probabilities (model.attn_pdrop: "
            f"{self.attn_pdrop}); choose auto or reference",
        )
        require(
            not self.fp8 or self.compute_dtype == "bfloat16",
            f"model.fp8 needs model.compute_dtype: bfloat16, not {self.compute_dtype}",
        )

    @property
    def dropout(self) -> bool:
        """Whether anything is dropped in training."""
        return any((self.embd_pdrop, self.attn_pdrop, self.resid_pdrop))


@dataclass(frozen=True)
class DataConfig:
    """Text, its tokenizer, and the rows of token ids made from them."""

    source: Literal["synthetic", "pile", "parquet", "pubmed_xml", "jats_xml", "text"] = "synthetic"
    """Format of the text: the bundled generator, The Pile's JSON lines, Parquet with a text column, NLM's PubMed XML,
    PubMed Central's JATS XML (files or tar archives), or plain text files; all but Parquet also under gzip or zstd."""
    train_files: Paths = ()
    """Paths, globs or URLs (gs://, s3://, https://) of training text."""
    eval_files: Paths = ()
    """Paths, globs or URLs of held-out text; none means no evaluation, unless data.eval_fraction is set."""
    eval_fraction: float = 0.0
    """Fraction of the documents of data.train_files to hold out, chosen by a hash of their text."""
    pile_sets: tuple[str, ...] = ("PubMed Abstracts", "PubMed Central")
    """Which of The Pile's sets to keep, by meta.pile_set_name; [] keeps every record, also without that name."""
    text_field: str = "text"
    """Name of the text in records of source: pile and in columns of source: parquet."""
    languages: tuple[str, ...] = ("eng",)
    """Languages of source: pubmed_xml and jats_xml to keep, in NLM's codes; [] keeps all."""
    benchmark_files: Paths = ()
    """Paths, globs or URLs of the questions of downstream tasks, looked for in the training text."""
    contaminated: Literal["drop", "report"] = "drop"
    """What becomes of training documents that share 13 words in a row with data.benchmark_files, or all words of a text
    of 8 to 12."""
    processes: int = 0
    """Processes that prepare rows on this machine; 0 is one a core where there is enough text. Changes no row."""
    dir: str = ""
    """Folder of the prepared rows, made when missing; by default 'prepared' inside run.dir."""
    tokenizer: str = ""
    """Folder of an existing tokenizer (tokenizer.model, or vocab.json and merges.txt); by default one is trained
    on the abstracts among the training text."""
    max_bad_fraction: float = 0.001
    """Fraction of broken records above which preparation fails instead of skipping them."""
    synthetic_documents: int = 20_000
    """Training documents of source: synthetic."""
    synthetic_eval_documents: int = 500
    """Held-out documents of source: synthetic."""
    reader_threads: int = 4
    """Threads that read rows ahead of the step."""
    mixture: dict[str, float] = field(default_factory=dict, hash=False)
    """Folders of prepared rows and their weights: each batch draws from all of them. Replaces data.dir and its text."""
    document_attention: bool = False
    """Attend within a document only, its positions counted from its start; false attends to all of a row before."""

    def __post_init__(self) -> None:
        if self.source != "synthetic":
            require(
                bool(as_paths(self.train_files)) or bool(self.dir) or bool(self.mixture),
                f"data.source {self.source} needs data.train_files, or data.dir of rows prepared before",
            )
        for code in self.languages:
            require(
                re.fullmatch("[a-z]{3}", code) is not None,
                f"data.languages has NLM's codes of three letters, such as eng and ger, not {code}",
            )
        require(0 <= self.eval_fraction < 1, f"data.eval_fraction must be in [0, 1), not {self.eval_fraction}")
        if self.eval_fraction:
            require(
                self.source != "synthetic" and not as_paths(self.eval_files),
                "data.eval_fraction holds documents of data.train_files out: it goes neither with data.eval_files nor "
                "with source synthetic",
            )
        require(self.processes >= 0, f"data.processes must not be negative, not {self.processes}")
        require(
            0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction must be in [0, 1], not {self.max_bad_fraction}"
        )
        require_each(self, "data", "be at least 1", "synthetic_documents", "synthetic_eval_documents", "reader_threads")
        for folder, weight in self.mixture.items():
            require(bool(folder.strip()), "data.mixture has a folder without a name")
            require(
                0 < weight < math.inf, f"data.mixture: the weight of {folder} must be a number above 0, not {weight}"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """Decoupled AdamW as in Composer, under linear warm-up and cosine decay."""

    learning_rate: float = 1.6e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 1.6e-5
    """Fraction of every parameter removed per step at the peak rate; torch's and optax's AdamW call it
    weight_decay / learning_rate (here 0.1)."""
    warmup_steps: int = 100
    """Steps of linear warm-up; the first step has rate 0."""
    final_fraction: float = 0.1
    """Learning rate at train.steps, as a fraction of the peak."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 never clips."""

    def __post_init__(self) -> None:
        require_each(self, "optimizer", "be above 0", "learning_rate", "eps")
        require_each(self, "optimizer", "be in [0, 1)", "beta1", "beta2")
        require_each(
            self, "optimizer", "not be negative", "weight_decay", "warmup_steps", "final_fraction", "clip_norm"
        )


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out: parameters are sharded over fsdp and copied over replica."""

    replica: int = 1
    """Copies of the sharded model."""
    fsdp: int = -1
    """Devices a copy is sharded over; -1 takes all that remain."""
    reshard_after_forward: bool = True
    """Gather a layer's weights again in the backward pass; false keeps those of the forward pass: a third less traffic,
    for a copy of all layers' weights in model.compute_dtype on every device."""
    reduce_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in which gradients of matrices are summed over devices where model.compute_dtype is bfloat16; float32 costs
    twice the traffic, and is safer past 128 devices. Those of embeddings, biases and LayerNorm take float32 always."""

    def __post_init__(self) -> None:
        require(self.replica >= 1, f"mesh.replica must be at least 1, not {self.replica}")
        require(self.fsdp >= 1 or self.fsdp == -1, f"mesh.fsdp must be at least 1, or -1 for the rest, not {self.fsdp}")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, and rhythm of a run."""

    steps: int = 286_102
    """Optimizer steps; the learning-rate schedule ends here."""
    global_batch_size: int = 1024
    """Sequences a step, over all devices."""
    gradient_accumulation_steps: int = 1
    """Parts the global batch is computed in, one after the other, to save memory; the result is the same."""
    seed: int = 0
    """Seed of the initial weights, of the order of rows, and of dropout."""
    loss_chunk: int = 0
    """Positions of a row whose logits exist at once, to save memory; must divide model.n_positions; 0 is all."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between evaluations on held-out rows; 0 evaluates at the end only."""
    eval_batches: int = 0
    """Global batches of an evaluation, of each set of data.mixture; 0 is all held-out rows."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; there is always one at the end."""
    keep_last: int = 3
    """Checkpoints kept, the newest ones."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept forever; 0 keeps none beyond keep_last."""
    profile_steps: int = 0
    """Steps of each start to profile, from its third on, into the run's folder; 0 profiles none."""

    def __post_init__(self) -> None:
        require_each(
            self,
            "train",
            "be at least 1",
            "steps",
            "global_batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "checkpoint_every",
            "keep_last",
        )
        require_each(
            self,
            "train",
            "not be negative",
            "seed",
            "loss_chunk",
            "eval_every",
            "eval_batches",
            "keep_every",
            "profile_steps",
        )
        require_whole_parts(self)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and where its numbers go."""

    dir: str = ""
    """Folder of the run: configuration, metrics, checkpoints. Started again on the same folder, a run goes on."""
    init_from: str = ""
    """Start from the weights of another run's folder or a Hugging Face GPT-2 folder; a checkpoint in run.dir wins."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str = ""
    """Also log to this project of Weights & Biases; needs `pip install wandb`."""
    connect_timeout: int = 300
    """Seconds that a process waits at the start until all processes of the run are there."""
    heartbeat_timeout: int = 30
    """Seconds without a sign of life after which a process counts as dead, and the others end."""
    check_bandwidth: bool = False
    """Measure at the start how fast the devices exchange data."""

    def __post_init__(self) -> None:
        require(self.connect_timeout >= 1, f"run.connect_timeout must be at least 1, not {self.connect_timeout}")
        require(
            self.heartbeat_timeout >= 5,
            f"run.heartbeat_timeout must be at least 5, not {self.heartbeat_timeout}: signs come every second",
        )


@dataclass(frozen=True)
class Config:
    """All settings of a pretraining run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(
            self.optimizer.warmup_steps < self.train.steps,
            f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be below train.steps ({self.train.steps})",
        )
        chunk = self.train.loss_chunk
        require(
            not chunk or self.model.n_positions % chunk == 0,
            f"train.loss_chunk must divide model.n_positions: {self.model.n_positions} / {chunk or 1} "
            "is not a whole number",
        )

    @property
    def prepared_dir(self) -> Path:
        """Folder of the prepared rows.

        Raises:
          UserError: neither data.dir nor run.dir says where.
        """
        require(bool(self.data.dir or self.run.dir), "neither run.dir nor data.dir is set: say where rows shall lie")
        return Path(self.data.dir) if self.data.dir else Path(self.run.dir) / "prepared"

    @property
    def prepared_dirs(self) -> dict[Path, float]:
        """Folders of prepared rows to read and their weights: data.mixture, or `prepared_dir` alone."""
        return {Path(folder): weight for folder, weight in self.data.mixture.items()} or {self.prepared_dir: 1.0}


class _Parser(jsonargparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest setting for an unknown one."""

    kind: type = Config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(str(message).split()).replace("Parser key ", "")
        unknown = re.search(r"unrecognized arguments: --([\w.]+)", message) or re.search(
            r"Option '([\w.]+)' is not accepted", message
        )
        in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        if unknown or in_group:
            key = unknown[1] if unknown else f"{in_group[1]}.{in_group[2]}" if in_group else ""
            message = f"unknown setting {key}{_nearest(key, self.kind)} (--help lists every setting)"
        raise UserError(message) from ex


def _setting_names(kind: type = Config) -> list[str]:
    return [f"{group}.{name}" for group, settings in dataclasses.asdict(kind()).items() for name in settings]


def _nearest(key: str, kind: type) -> str:
    names = _setting_names(kind)
    leaf = key.rpartition(".")[2]
    close = (
        difflib.get_close_matches(key, names, n=1, cutoff=0.7)
        or [name for name in names if name.partition(".")[2] == leaf]
        or difflib.get_close_matches(key, [name.partition(".")[0] for name in names], n=1)
        or difflib.get_close_matches(key, names, n=1, cutoff=0.4)
    )
    return f"; did you mean {close[0]}?" if close else ""


def _parser(
    kind: type,
    prog: str,
    description: str,
    add_options: Callable[[jsonargparse.ArgumentParser], None] = lambda parser: None,
    defaults: Mapping[str, Any] | None = None,
) -> _Parser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.kind = kind
    parser.add_argument("--config", action="config", help="YAML file of settings; dotted options win over it.")
    add_options(parser)
    parser.add_class_arguments(kind)
    parser.set_defaults(dict(defaults or {}))
    return parser


def parse_args(command: str, description: str, args: list[str] | None = None) -> Config:
    """The configuration of a command line: `--config FILE` and dotted overrides such as `--train.steps 100`.

    Args:
      command: the module's name, for `--help`.
      description: one line for `--help`.
      args: the arguments, `sys.argv[1:]` by default.

    Raises:
      UserError: an unknown setting (with the nearest name), a value of the wrong type, or values that contradict
        each other.
    """
    return parse_args_with(command, description, lambda parser: None, args)[0]


def parse_args_with(
    command: str,
    description: str,
    add_options: Callable[[jsonargparse.ArgumentParser], None],
    args: list[str] | None = None,
    kind: type = Config,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, jsonargparse.Namespace]:
    """`parse_args` for a command with options of its own, which `add_options` adds; returns their values, too.

    Args:
      kind: the class of the configuration, whose fields are groups of settings.
      defaults: other defaults than the class's, by 'group.name'.
    """
    parser = _parser(kind, f"python -m biomedlm_jax.{command}", description, add_options, defaults)
    values = jsonargparse.Namespace()

    def parse() -> jsonargparse.Namespace:
        values.update(parser.parse_args(args))
        return values

    return _instantiate(parser, parse), values


def peek(
    setting: str,
    kind: type,
    args: list[str] | None = None,
    add_options: Callable[[jsonargparse.ArgumentParser], None] = lambda parser: None,
) -> Any:
    """The value that a command line, or the file that it names, gives a setting; no values are checked by it.

    Raises:
      UserError: see `parse_args`.
    """
    return _parsed(lambda: _parser(kind, "", "", add_options).parse_args(args))[setting]


def has_group(group: str, args: list[str] | None = None) -> bool:
    """Whether a command line, or the file that it names, has settings of a group."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    known, others = parser.parse_known_args(args)
    if any(other.startswith(f"--{group}.") for other in others):
        return True
    return any(file_has_group(group, file) for file in known.config)


def file_has_group(group: str, path: str | Path) -> bool:
    """Whether a YAML file has settings of a group; not if it cannot be read, which `load_config` explains."""
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        groups = yaml.safe_load(Path(path).read_bytes())
        return isinstance(groups, dict) and group in groups
    return False


def load_config(path: str | Path, kind: type = Config) -> Any:
    """The configuration in a YAML file, as `save_config` writes it.

    Raises:
      UserError: the file is missing, is not YAML, or holds an unknown setting; names the file.
    """
    parser = _parser(kind, str(path), "")
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: is {Path(path).parent} the folder of a run?")
    try:
        return _instantiate(parser, lambda: parser.parse_path(str(path)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _instantiate(parser: _Parser, parse: Callable[[], jsonargparse.Namespace]) -> Any:
    values = _parsed(lambda: parser.instantiate(parse()))
    return parser.kind(**{group.name: values[group.name] for group in dataclasses.fields(parser.kind)})


def _parsed(parse: Callable[[], jsonargparse.Namespace]) -> jsonargparse.Namespace:
    try:
        return parse()
    except UnicodeDecodeError as error:
        raise UserError(f"the configuration is not UTF-8: {error}") from error
    except TypeError as error:
        raise UserError("the configuration must have groups of settings, such as model: {n_layer: 2}") from error


def save_config(config: Any, path: str | Path) -> None:
    """Writes every setting to a YAML file that `--config` and `load_config` read back."""
    values = {
        group: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
        for group, section in dataclasses.asdict(config).items()
    }
    replace_file(path, yaml.safe_dump(values, sort_keys=False, width=120, allow_unicode=True).encode())


def as_used(config: Any) -> Any:
    """A run's configuration as its model is used outside of training steps: without FP8."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, fp8=False))


# Settings that may change when a run goes on: they decide how and where it is computed, not what. (FP8 rounds more.)
_MAY_CHANGE = {
    "task": {"train_files", "eval_files"},
    "model": {"attention", "remat", "unroll", "fp8"},
    "train": {
        "gradient_accumulation_steps",
        "loss_chunk",
        "log_every",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "patience",
        "profile_steps",
    },
}


def differences(before: Any, after: Any) -> list[str]:
    """The settings that make `after` another run than `before`: 'model.n_layer was 2, is 4'.

    The data are not compared, but for what is made of them: a checkpoint records the hash of the rows themselves.
    """
    found = []
    for group in ("data", "task", "model", "lora", "optimizer", "train"):
        if not hasattr(after, group):
            continue
        there, here = (dataclasses.asdict(getattr(config, group)) for config in (before, after))
        if group == "data":
            here = {"document_attention": here["document_attention"]}
        found += [
            f"{group}.{name} was {there[name]}, is {here[name]}"
            for name in here
            if name not in _MAY_CHANGE.get(group, ()) and there[name] != here[name]
        ]
    return found
