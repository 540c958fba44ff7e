"""Runs as Hugging Face folders: weights tensor by tensor, configuration, tokenizer, and a model card.

A fine-tuned model's head goes with it: one for classification as transformers' own GPT2ForSequenceClassification has
it, one for multiple choice beside the code that transformers loads it by.
"""

import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore
from flax import traverse_util
from tqdm import tqdm

from biomedlm_jax import checkpoint, load, model_card, tokenizer, weights
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import MULTIPLE_CHOICE, FinetuneConfig
from biomedlm_jax.huggingface import (
    GPT2_CONFIG,
    HEAD,
    MEMORY_FOLDER,
    MODEL_FIELDS,
    PREFIX,
    SPECIAL_IDS,
    Tensor,
    head_tensors,
    new_folder,
    open_arrays,
    parameter_shapes,
    progress_of,
    task_fields,
    tensors,
)
from biomedlm_jax.tasks import TASKS
from biomedlm_jax.weights import Dtype, Format

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Export:
    """What an export wrote: bytes of tensors, the files that hold them, and the class that loads it."""

    total_bytes: int
    files: list[Path]
    loaded_by: str


def export(
    run_dir: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    dtype: Dtype = "float32",
    format: Format = "safetensors",
    max_shard_bytes: float = 5e9,
) -> Export:
    """Writes a run's checkpoint as a folder that transformers' `from_pretrained` and `AutoTokenizer` load.

    As transformers writes them: safetensors hold no `lm_head.weight`, which is tied; pytorch_model.bin holds it as
    another name of the embedding. One tensor is in memory at a time, of LoRA the whole model, whose products are merged
    into its matrices; PyTorch's format takes a shard.

    Args:
      run_dir: folder of a run.
      output: folder to make; must not exist, or be empty.
      step: the checkpoint, by default the newest, of fine-tuning the best.
      dtype: type of the tensors.
      format: model.safetensors or pytorch_model.bin.
      max_shard_bytes: weights beyond it are split into several files, with an index.

    Raises:
      UserError: there is no such run or step; `output` is not empty; a value is too large for `dtype`.
    """
    run_dir, step = Path(run_dir), checkpoint.find_step(run_dir, step)
    config = checkpoint.read_config(run_dir)
    head = _Head(config)
    all_tensors = tensors(config.model) + head.tensors
    arrays = _open(run_dir, step, config, head)
    named = [(head.prefixed(tensor.name), tensor.shape) for tensor in all_tensors]
    size = sum(math.prod(tensor.shape) for tensor in all_tensors) * jnp.dtype(dtype).itemsize
    with new_folder(output) as folder, progress_of(f"writing {output}", size) as progress:
        values = _read_all(all_tensors, [name for name, _ in named], arrays, dtype, progress)
        files = weights.write_shards(
            folder,
            named,
            values,
            dtype=dtype,
            format=format,
            max_shard_bytes=max_shard_bytes,
            aliases={} if head.tensors else {HEAD: PREFIX + "wte.weight"},
        )
        _write_configs(run_dir, folder, config, head, dtype)
        if (run_dir / checkpoint.TOKENIZER_FOLDER).is_dir():
            tokenizer.export_tokenizer(
                tokenizer.load_tokenizer(run_dir / checkpoint.TOKENIZER_FOLDER),
                folder,
                model_max_length=config.model.n_positions,
                added_tokens=config.added_tokens if isinstance(config, FinetuneConfig) else (),
                truncation_side=config.task.truncation_side if isinstance(config, FinetuneConfig) else "right",
            )
        else:
            logger.warning("%s has no tokenizer, and neither has what is exported", run_dir)
        if head.code:
            shutil.copyfile(head.code, folder / head.code.name)
        (folder / "README.md").write_text(model_card.make(run_dir, step, config, head.architecture), encoding="utf-8")
    return Export(size, [Path(output) / name for name in files], head.loaded_by)


class _Head:
    """What of a folder depends on the head that a run's model has, or has not.

    Attributes:
      architecture: the class in transformers.
      loaded_by: the class by which users load it.
      tensors: of the head, the last ones of the state_dict.
      fields: of config.json.
      code: a file that defines the class, if transformers does not.
    """

    def __init__(self, config: Config | FinetuneConfig):
        self.architecture, self.loaded_by = "GPT2LMHeadModel", "AutoModelForCausalLM"
        self.tensors: list[Tensor] = []
        self.fields: dict[str, Any] = {}
        self.code: Path | None = None
        if not isinstance(config, FinetuneConfig):
            return
        self.fields = task_fields(config)
        self.tensors = head_tensors(config)
        if not self.tensors:
            return
        if config.task.name in MULTIPLE_CHOICE:
            self.architecture, self.loaded_by = "GPT2ForMultipleChoice", "AutoModelForMultipleChoice"
            self.code = Path(__file__).with_name("multiple_choice_model.py")
            self.fields |= {"auto_map": {self.loaded_by: f"{self.code.stem}.{self.architecture}"}}
        else:
            self.architecture, self.loaded_by = "GPT2ForSequenceClassification", "AutoModelForSequenceClassification"
            labels = TASKS[config.task.name].labels
            self.fields |= {
                "id2label": {str(number): label for number, label in enumerate(labels)},
                "label2id": {label: number for number, label in enumerate(labels)},
                "problem_type": "single_label_classification",
            }
        self.fields["architectures"] = [self.architecture]

    def prefixed(self, name: str) -> str:
        """A tensor's name in the state_dict."""
        return name if name in {tensor.name for tensor in self.tensors} else PREFIX + name


def _write_configs(run_dir: Path, output: Path, config: Config | FinetuneConfig, head: _Head, dtype: Dtype) -> None:
    """config.json and generation_config.json: what an import remembered, or new ones with the tokenizer's ids."""
    memory = run_dir / MEMORY_FOLDER
    has_tokenizer = (run_dir / checkpoint.TOKENIZER_FOLDER).is_dir()
    eos_id = tokenizer.load_tokenizer(run_dir / checkpoint.TOKENIZER_FOLDER).eos_id if has_tokenizer else None
    if (memory / "config.json").is_file():
        fields = weights.read_json(memory / "config.json")
        eos_id = fields.get("eos_token_id") if eos_id is None else eos_id
    else:
        fields = {**GPT2_CONFIG, **dict.fromkeys(SPECIAL_IDS, eos_id), "dtype": dtype}
    # A field that means what it meant stays as it was written, or absent.
    fields |= {
        name: getattr(config.model, name)
        for name in MODEL_FIELDS
        if fields.get(name, GPT2_CONFIG[name]) != getattr(config.model, name)
    }
    fields |= {name: dtype for name in ("dtype", "torch_dtype") if name in fields}
    weights.write_json(output / "config.json", fields | head.fields)
    if head.tensors:
        return
    if (memory / "generation_config.json").is_file():
        shutil.copyfile(memory / "generation_config.json", output / "generation_config.json")
    else:
        # Generation stops at the end of text, and batches are padded with it.
        weights.write_json(output / "generation_config.json", dict.fromkeys(SPECIAL_IDS, eos_id))


def _open(run_dir: Path, step: int, config: Config | FinetuneConfig, head: _Head) -> dict[str, tensorstore.TensorStore]:
    """The parameters by path, not read yet, but for those of LoRA."""
    folder = checkpoint.checkpoint_folder(run_dir) / str(step) / "params"
    paths = [tensor.path for tensor in head.tensors if tensor.path == "score/kernel"]
    if isinstance(config, FinetuneConfig) and config.lora.rank:
        params = traverse_util.flatten_dict(load.load_params(run_dir, step), sep="/")
        arrays = {
            path: tensorstore.array(np.asarray(params[path])) for path in [*parameter_shapes(config.model), *paths]
        }
    else:
        arrays = open_arrays(folder, paths)
        for path, shape in parameter_shapes(config.model).items():
            if arrays[path].shape != shape:
                raise UserError(f"{folder}: {path} has shape {arrays[path].shape}, not the configuration's {shape}")
    if paths:
        kernel = arrays["score/kernel"].read().result()
        arrays["score/kernel"] = tensorstore.array(np.ascontiguousarray(kernel.T))
        # The bias of multiple choice: see `heads`.
        arrays["score/bias"] = tensorstore.array(np.zeros(kernel.shape[1], np.float32))
    return arrays


def _read_all(
    all_tensors: list[Tensor],
    names: list[str],
    arrays: dict[str, tensorstore.TensorStore],
    dtype: Dtype,
    progress: tqdm,
) -> Iterator[np.ndarray]:
    for tensor, name in zip(all_tensors, names, strict=True):
        value = tensor.of(arrays).read().result()
        with np.errstate(over="ignore"):
            cast = value.astype(jnp.dtype(dtype))
        if not np.array_equal(np.isfinite(cast), np.isfinite(value)):
            raise UserError(
                f"{name} has values up to {np.nanmax(np.abs(value)):g}, beyond the range of "
                f"{dtype}: export another type"
            )
        progress.update(cast.nbytes)
        yield cast
