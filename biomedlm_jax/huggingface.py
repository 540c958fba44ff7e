"""Hugging Face GPT-2 folders: what is in them, and how they are read, without running anything in them.

`TENSORS` pairs each parameter here with its tensors there. GPT-2's Conv1D stores (in, out) as Flax does, so nothing
is transposed. What an import could not represent, it remembers in the run's folder for the next export:

    RUN/huggingface/config.json              as it was read; an export changes only what the run changed
    RUN/huggingface/generation_config.json   if there was one
"""

import contextlib
import dataclasses
import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import tensorstore
from flax import traverse_util
from tqdm import tqdm

from biomedlm_jax import adaptation, checkpoint, model, tokenizer, weights
from biomedlm_jax.config import Config, ModelConfig, save_config
from biomedlm_jax.errors import UserError, reason
from biomedlm_jax.files import complete_folder
from biomedlm_jax.finetune_config import GENERATION, MULTIPLE_CHOICE, FinetuneConfig, Name, TaskConfig
from biomedlm_jax.model import Params
from biomedlm_jax.weights import Entry

logger = logging.getLogger(__name__)

# Parameter path -> tensor name; {} is the layer, the first axis of a parameter in `h`. In the order of a state_dict.
TENSORS = {
    "wte/embedding": "wte.weight",
    "wpe/embedding": "wpe.weight",
    "h/ln_1/scale": "h.{}.ln_1.weight",
    "h/ln_1/bias": "h.{}.ln_1.bias",
    "h/attn/c_attn/kernel": "h.{}.attn.c_attn.weight",
    "h/attn/c_attn/bias": "h.{}.attn.c_attn.bias",
    "h/attn/c_proj/kernel": "h.{}.attn.c_proj.weight",
    "h/attn/c_proj/bias": "h.{}.attn.c_proj.bias",
    "h/ln_2/scale": "h.{}.ln_2.weight",
    "h/ln_2/bias": "h.{}.ln_2.bias",
    "h/mlp/c_fc/kernel": "h.{}.mlp.c_fc.weight",
    "h/mlp/c_fc/bias": "h.{}.mlp.c_fc.bias",
    "h/mlp/c_proj/kernel": "h.{}.mlp.c_proj.weight",
    "h/mlp/c_proj/bias": "h.{}.mlp.c_proj.bias",
    "ln_f/scale": "ln_f.weight",
    "ln_f/bias": "ln_f.bias",
}
# GPT2LMHeadModel's names have the prefix; GPT2Model's, and the original gpt2 files', do not.
PREFIX = "transformer."
HEAD = "lm_head.weight"
# The causal mask, which older transformers saved as buffers of every layer.
_IGNORED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

# Every field of transformers' GPT2Config and its default, which is what a missing field means.
GPT2_CONFIG: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "use_cache": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
    "summary_first_dropout": 0.1,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": None,
}
# Those that are settings of the model here, under the same names.
MODEL_FIELDS = [field.name for field in dataclasses.fields(ModelConfig) if field.name in GPT2_CONFIG]
# Those that this model has only one value of. reorder_and_upcast_attn is free: it orders the same computation
# otherwise, in float32, which is what we do anyway.
_FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "scale_attn_weights": (True,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}

# Where the field's own configurations keep what a model was fine-tuned for.
_TASK_FIELD = "task_specific_params"
# Of that, the type of activations that it was fine-tuned with, which may be another than that of the weights.
_TASK_DTYPE = "compute_dtype"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MEMORY_FOLDER = "huggingface"
_REMEMBERED = ("config.json", "generation_config.json")
_DTYPES = ("float32", "bfloat16", "float16")
_PROBLEMS_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor there, and the parameter, or the layer of one, that it is here."""

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]

    def of(self, arrays: dict[str, Any]) -> Any:
        """Its part of the stacked arrays, by path."""
        return arrays[self.path] if self.layer is None else arrays[self.path][self.layer]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by path, layers stacked; in the order of `TENSORS`."""
    abstract = jax.eval_shape(lambda: model.init_params(config, 0))
    flat = traverse_util.flatten_dict(abstract, sep="/")
    return {path: flat[path].shape for path in TENSORS}


def tensors(config: ModelConfig) -> list[Tensor]:
    """The model's tensors in the order of GPT2Model's state_dict, with names that have no prefix."""
    shapes = parameter_shapes(config)
    whole = [Tensor(TENSORS[path], path, None, shape) for path, shape in shapes.items() if not path.startswith("h/")]
    layers = [
        Tensor(TENSORS[path].format(layer), path, layer, shape[1:])
        for layer in range(config.n_layer)
        for path, shape in shapes.items()
        if path.startswith("h/")
    ]
    return whole[:2] + layers + whole[2:]


def head_tensors(config: FinetuneConfig) -> list[Tensor]:
    """Those of the head that a task's model has, the last ones of the state_dict."""
    answers = adaptation.scores_per_row(config)
    weight = (answers, config.model.n_embd)
    if not answers:
        return []
    if config.task.name in MULTIPLE_CHOICE:
        return [
            Tensor("classifier.weight", "score/kernel", None, weight),
            Tensor("classifier.bias", "score/bias", None, (answers,)),
        ]
    return [Tensor("score.weight", "score/kernel", None, weight)]


# ---------------------------------------------------------------------------------------------------- configuration


def read_config(directory: str | Path) -> ModelConfig:
    """The model of a folder's config.json.

    Its activations get the type that it was fine-tuned with here, or else saved in (float16 gets bfloat16, which does
    not overflow); other settings of execution keep their defaults.

    Raises:
      UserError: config.json is missing or broken, or asks for what this model does not compute; lists all of it.
    """
    raw = weights.read_json(Path(directory) / "config.json")
    fields = {**GPT2_CONFIG, **raw}
    problems = [
        f"{name} is {fields[name]!r}, and this model has {' or '.join(map(repr, allowed))} only"
        for name, allowed in _FIXED_FIELDS.items()
        if fields[name] not in allowed
    ]
    for name in MODEL_FIELDS:
        kinds = (int, float) if isinstance(GPT2_CONFIG[name], float) else (type(GPT2_CONFIG[name]),)
        if type(fields[name]) not in kinds:
            problems.append(f"{name} is {fields[name]!r}, and not a value of type {kinds[-1].__name__}")
    if not problems and fields["n_inner"] not in (None, 4 * fields["n_embd"]):
        problems.append(f"n_inner is {fields['n_inner']}, and this model has 4 x n_embd only")
    if problems:
        raise UserError(f"{directory}/config.json describes a model that cannot be converted: {'; '.join(problems)}")
    saved_in = fields.get("dtype", fields.get("torch_dtype"))
    computed_in = "bfloat16" if saved_in in ("bfloat16", "float16") else "float32"
    try:
        return ModelConfig(
            **{name: fields[name] for name in MODEL_FIELDS},
            compute_dtype=_task_settings(raw)[1].get(_TASK_DTYPE, computed_in),
        )
    except UserError as error:
        raise UserError(f"{directory}/config.json: {error}") from error


def task_fields(config: FinetuneConfig) -> dict[str, Any]:
    """What config.json tells of the task that a model was fine-tuned for; `read_task` reads it."""
    return {_TASK_FIELD: {config.task.name: {**asked_as(config), _TASK_DTYPE: config.model.compute_dtype}}}


def _task_settings(raw: dict[str, Any]) -> tuple[Name | None, dict[str, Any]]:
    """A task's name and what `task_fields` told of it; None and nothing of other models."""
    told = raw.get(_TASK_FIELD)
    # Other models have other things there, such as GPT-2's settings of "text-generation".
    name = next((name for name in get_args(Name) if name in told), None) if isinstance(told, dict) else None
    settings = told[name] if told and name else {}
    return name, settings if isinstance(settings, dict) else {"settings": settings}


def asked_as(config: FinetuneConfig) -> dict[str, Any]:
    """Settings of a task that say how its model is asked, and not what it was made from, by name."""
    task = dataclasses.asdict(config.task)
    lengths = ("max_source_length", "max_target_length")
    names = lengths if config.task.name in GENERATION else ("max_length", "truncation_side")
    return {name: task[name] for name in names}


def read_task(directory: str | Path) -> FinetuneConfig | None:
    """The task of a model that was fine-tuned here and exported, as its config.json tells; None of other models.

    Raises:
      UserError: it tells what no task has; see `read_config`.
    """
    path = Path(directory) / "config.json"
    name, settings = _task_settings(weights.read_json(path))
    if name is None:
        return None
    model = read_config(directory)
    try:
        own = {key: value for key, value in settings.items() if key != _TASK_DTYPE}
        return FinetuneConfig(task=TaskConfig(name=name, **own), model=model)
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: {_TASK_FIELD}: {error}") from error


# ----------------------------------------------------------------------------------------------------- reading a folder


def load_params(directory: str | Path, head: Sequence[Tensor] = ()) -> tuple[ModelConfig, Params]:
    """The model in a folder: config.json and model.safetensors or pytorch_model.bin, whole or in shards.

    Tensors are read one at a time into stacked float32 arrays. No pickle is executed.

    Args:
      head: `head_tensors` of a model that has them. A bias that is the same for all choices is left out: see `heads`.

    Raises:
      UserError: see `read_config`; files are damaged; tensors are missing, unknown, or of other shapes or types than
        the configuration's; lists all of them.
    """
    directory = Path(directory)
    config, expected, entries = _checked_entries(directory, head)
    shapes = parameter_shapes(config) | {tensor.path: tensor.shape for tensor in head}
    flat = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    for tensor, value in _read_entries(directory, expected, entries):
        tensor.of(flat)[...] = value
    if head:
        flat["score/kernel"] = flat["score/kernel"].T
        flat.pop("score/bias", None)
    return config, traverse_util.unflatten_dict(flat, sep="/")


def check_weights(directory: str | Path, head: Sequence[Tensor] = ()) -> None:
    """Raises: UserError: what `load_params` would raise but for damaged values, of which it reads none."""
    _checked_entries(Path(directory), head)


def _checked_entries(
    directory: Path, head: Sequence[Tensor] = ()
) -> tuple[ModelConfig, list[Tensor], dict[str, Entry]]:
    """The configuration, the tensors that a folder must hold, and those that it holds, which are the same."""
    config = read_config(directory)
    expected = [*tensors(config), *head]
    entries, problems = _strip_prefix(weights.read_entries(directory))
    _check(directory, entries, expected, problems)
    return config, expected, entries


def _read_entries(
    directory: Path, expected: list[Tensor], entries: dict[str, Entry]
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Every tensor of the model, in float32; says so if there is another head beside them."""
    with progress_of(f"reading {directory}", sum(math.prod(tensor.shape) * 4 for tensor in expected)) as progress:
        for tensor in expected:
            yield tensor, entries[tensor.name].read().astype(np.float32, copy=False)
            progress.update(math.prod(tensor.shape) * 4)
    if HEAD in entries:
        _compare_head(directory, entries[HEAD].read(), entries["wte.weight"].read())


def _check(directory: Path, entries: dict[str, Entry], expected: list[Tensor], problems: list[str]) -> None:
    """Raises UserError: lists what `entries` lack, and what they should not hold."""
    shapes = {tensor.name: tensor.shape for tensor in expected}
    problems += [f"{name} is missing" for name in shapes if name not in entries]
    shapes[HEAD] = shapes["wte.weight"]
    for name, entry in entries.items():
        if _IGNORED.fullmatch(name):
            continue
        if name not in shapes:
            problems.append(f"{name} is no tensor of this model")
        elif entry.shape != shapes[name]:
            problems.append(f"{name} has shape {entry.shape}, not {shapes[name]}")
        elif entry.dtype not in _DTYPES:
            problems.append(f"{name} has type {entry.dtype}, not {', '.join(_DTYPES)}")
    if problems:
        more = [f"... and {len(problems) - _PROBLEMS_SHOWN} more"] if len(problems) > _PROBLEMS_SHOWN else []
        raise UserError(
            "\n  ".join(
                [f"the tensors in {directory} are not those of its config.json:", *problems[:_PROBLEMS_SHOWN], *more]
            )
        )


def _strip_prefix(named: Iterable[tuple[str, Entry]]) -> tuple[dict[str, Entry], list[str]]:
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for name, entry in named:
        if (bare := name.removeprefix(PREFIX)) in entries:
            problems.append(f"{bare} is there twice")
        entries[bare] = entry
    return entries, problems


def _compare_head(directory: Path, head: np.ndarray, wte: np.ndarray) -> None:
    differing, largest = 0, 0.0
    for start in range(0, len(wte), 1024):
        rows = slice(start, start + 1024)
        difference = np.abs(head[rows].astype(np.float32) - wte[rows].astype(np.float32))
        differing += int((difference != 0).any(axis=1).sum())
        largest = max(largest, float(difference.max()))
    if differing:
        logger.warning(
            "%s: %s differs from %swte.weight in %d of %d rows, by up to %g; it is left out and the "
            "embedding is used, as Hugging Face does when it ties the two",
            directory,
            HEAD,
            PREFIX,
            differing,
            len(wte),
            largest,
        )


# ------------------------------------------------------------------------------------------------- between the two


def import_model(directory: str | Path, run_dir: str | Path) -> ModelConfig:
    """Makes the folder of a run, at step 0 and without an optimizer's state, from a Hugging Face folder.

    One tensor is in memory at a time; of a pytorch_model.bin also pages of the file, which the system can take back.

    Raises:
      UserError: `run_dir` is not empty; see `load_params`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is no folder; download a model first: hf download OWNER/NAME --local-dir DIR")
    if task := read_task(directory):
        raise UserError(
            f"{directory} was fine-tuned for {task.task.name} here and exported: evaluate, generate and "
            "run.init_from take it as it is"
        )
    with new_folder(run_dir) as folder:
        config, expected, entries = _checked_entries(directory)
        arrays = create_checkpoint(folder, config)
        for tensor, value in _read_entries(directory, expected, entries):
            tensor.of(arrays).write(value).result()
        save_config(Config(model=config), folder / checkpoint.CONFIG_FILE)
        try:
            its_tokenizer = tokenizer.load_tokenizer(directory)
            its_tokenizer.save(folder / checkpoint.TOKENIZER_FOLDER)
        except UserError as error:
            logger.warning("the model is converted WITHOUT A TOKENIZER, and can read token ids only: %s", error)
        else:
            if its_tokenizer.vocab_size > config.vocab_size:
                raise UserError(
                    f"{directory}: the tokenizer has {its_tokenizer.vocab_size} words, the model {config.vocab_size}"
                )
        (folder / MEMORY_FOLDER).mkdir()
        for name in _REMEMBERED:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, folder / MEMORY_FOLDER / name)
    return config


def create_checkpoint(run_dir: Path, config: ModelConfig) -> dict[str, tensorstore.TensorStore]:
    """A checkpoint of step 0 without values, to write layer by layer: its parameters by path, float32.

    Orbax saves whole trees only, and takes three times their memory. So it saves one of the same structure with a
    single number in each array, and the arrays are then made anew in their true shapes.
    """
    shapes = parameter_shapes(config)
    seeds = {path: np.zeros([1] * len(shape), np.float32) for path, shape in shapes.items()}
    checkpoint.save_params(run_dir, 0, traverse_util.unflatten_dict(seeds, sep="/"))
    arrays = {}
    for path, seed in open_arrays(checkpoint.checkpoint_folder(run_dir) / "0" / "params").items():
        shape = shapes[path]
        place = seed.spec().to_json()
        # Otherwise zeros would be left out of the files, as Orbax never does.
        spec = {"driver": place["driver"], "kvstore": place["kvstore"], "store_data_equal_to_fill_value": True}
        chunk = tensorstore.ChunkLayout(write_chunk_shape=(1, *shape[1:]) if path.startswith("h/") else shape)
        arrays[path] = tensorstore.open(
            spec, create=True, delete_existing=True, shape=shape, dtype=seed.dtype, codec=seed.codec, chunk_layout=chunk
        ).result()
    return arrays


def open_arrays(folder: Path, more: Iterable[str] = ()) -> dict[str, tensorstore.TensorStore]:
    """The parameters that Orbax saved, by path, not read yet: it stores each as an array of an OCDBT database.

    Args:
      folder: a checkpoint's.
      more: paths besides those of `TENSORS`.
    """
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    specs = {
        path: {"driver": "auto", "kvstore": {**store, "path": f"{path.replace('/', '.')}/"}}
        for path in [*TENSORS, *more]
    }
    try:
        return {path: tensorstore.open(spec).result() for path, spec in specs.items()}
    except ValueError as error:
        raise UserError(
            f"cannot read the checkpoint {folder} ({reason(error)}); if an older step is whole, name it"
        ) from error


def new_folder(output: str | Path) -> contextlib.AbstractContextManager[Path]:
    """A folder to fill, as `files.complete_folder`. Raises: UserError: there is something in it."""
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} already exists and is not empty; choose another --output, or remove it")
    return complete_folder(output)


def progress_of(description: str, total_bytes: int) -> tqdm:
    """A bar on standard error if that is a terminal."""
    return tqdm(desc=description, total=total_bytes, unit="B", unit_scale=True, disable=None, leave=False, delay=1)
