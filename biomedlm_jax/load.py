"""A model to call from Python, from a run's folder or a Hugging Face folder."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from biomedlm_jax import adaptation, checkpoint, devices, distributed, heads, huggingface, sharding
from biomedlm_jax import model as model_lib
from biomedlm_jax import tokenizer as tokenizer_lib
from biomedlm_jax.config import Config, MeshConfig, ModelConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import FinetuneConfig
from biomedlm_jax.model import Params

# Settings that two models must have in common for the weights of one to be those of the other.
_ARCHITECTURE = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "layer_norm_epsilon",
    "scale_attn_by_inverse_layer_idx",
)


class LanguageModel:
    """A causal language model: token ids to the logits of the next token.

    Attributes:
      config: the model's configuration.
      params: its float32 parameters, as `model.init_params` nests them.
    """

    def __init__(self, config: ModelConfig, params: Params, tokenizer_dir: Path):
        self.config = config
        self.params = params
        self._tokenizer_dir = tokenizer_dir

    @functools.cached_property
    def tokenizer(self) -> tokenizer_lib.Tokenizer:
        """The tokenizer beside the model.

        Raises:
          UserError: there is none, its files are broken, or it has words that the model does not know.
        """
        return _load_tokenizer(self._tokenizer_dir, self.config)

    def __call__(
        self, tokens: Any, attention_mask: Any = None, position_ids: Any = None
    ) -> Float[Array, "batch seq vocab"]:
        """Logits in float32, without dropout; compiled once for each shape.

        Args:
          tokens: ids in [0, vocab_size), [batch, seq]: an array of any library, or lists of lists.
          attention_mask: 1 or true for tokens, 0 or false for padding, [batch, seq]; padding is never attended to, and
            its own logits mean nothing.
          position_ids: where each token stands, [batch, seq]; by default 0, 1, 2, ..., whatever the mask, as in
            transformers' forward.

        Raises:
          UserError: shapes, types or values that the model cannot take. JAX alone would compute nonsense from an id
            out of range.
        """
        config = self.config
        ids = _integers("tokens", tokens, config.vocab_size, "vocabulary", None)
        if ids.shape[1] > config.n_positions:
            raise UserError(
                f"tokens: {ids.shape[1]} in a row, and the model reads up to {config.n_positions}; "
                "shorten the rows or split them"
            )
        mask = positions = None
        if attention_mask is not None:
            mask = _integers("attention_mask", attention_mask, 2, "mask", ids.shape).astype(bool)
            # Without a mask faster kernels can serve.
            mask = None if mask.all() else mask
        if position_ids is not None:
            positions = _integers("position_ids", position_ids, config.n_positions, "model's positions", ids.shape)
        return _logits(config, self.params, ids, mask, positions)


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"] | None,
    positions: Int[Array, "batch seq"] | None,
) -> Float[Array, "batch seq vocab"]:
    return model_lib.merge(config, params)(tokens, attention_mask=mask, position_ids=positions)


def _integers(name: str, values: Any, limit: int, what: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """`values` as int32 [batch, seq] in [0, limit), of `shape` if that is given."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise UserError(f"{name}: rows of different lengths; pad them, and pass attention_mask") from error
    if array.ndim != 2 or not array.size:
        raise UserError(f"{name} must have the shape [batch, seq], not {list(array.shape)}; for one row pass [row]")
    if shape is not None and array.shape != shape:
        raise UserError(f"{name} has shape {list(array.shape)}, and tokens have {list(shape)}")
    if not (np.issubdtype(array.dtype, np.integer) or (array.dtype == bool and limit == 2)):
        raise UserError(f"{name} must be integers, not {array.dtype}")
    if array.min() < 0 or array.max() >= limit:
        wrong = array[(array < 0) | (array >= limit)][0]
        raise UserError(f"{name}: {wrong} is out of the {what}, 0 to {limit - 1}")
    return array.astype(np.int32)


def load_model(
    path: str | Path, step: int | None = None, *, compute_dtype: Literal["float32", "bfloat16"] | None = None
) -> LanguageModel:
    """The model of a run's folder, or of a Hugging Face GPT-2 folder.

    Args:
      path: the folder.
      step: which checkpoint of a run, by default the newest.
      compute_dtype: type of activations, 'float32' or 'bfloat16'; by default the configuration's, or the type that a
        Hugging Face folder was saved in.

    Raises:
      UserError: the folder is neither, or is damaged; see `checkpoint.find_step` and `huggingface.load_params`.
    """
    path = Path(path)
    check_language_model(path)
    if compute_dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"compute_dtype must be float32 or bfloat16, not {compute_dtype}")
    config = read_config(path)
    if compute_dtype is not None:
        config = dataclasses.replace(config, compute_dtype=compute_dtype)
    return LanguageModel(config, load_params(path, step), _tokenizer_dir(path))


def check_language_model(path: str | Path) -> None:
    """Raises: UserError: a folder's model has a head that answers questions instead of predicting words."""
    if (task := read_task(path)) and adaptation.scores_per_row(task):
        raise UserError(
            f"{path} was fine-tuned to answer {task.task.name} by a head, and predicts no words: ask it with "
            f"python -m biomedlm_jax.evaluate --task {task.task.name}"
        )


def make_mesh(config: ModelConfig) -> Mesh:
    """All devices, with the model sharded over as many as divide its width; what is compiled from here on is kept."""
    devices.keep_compiled_programs(distributed.Job())
    count = jax.device_count()
    fsdp = math.gcd(count, config.n_embd)
    return sharding.make_mesh(MeshConfig(replica=count // fsdp, fsdp=fsdp))


def load_on_mesh(path: str | Path, step: int | None, mesh: Mesh) -> Params:
    """`load_params`, sharded over a mesh as in training."""
    return load_params(path, step, mesh_shardings(path, mesh))


def mesh_shardings(path: str | Path, mesh: Mesh) -> Params:
    """How the parameters of a folder's language model lie on a mesh."""
    config = read_config(path)
    return sharding.tree_shardings(mesh, jax.eval_shape(lambda: model_lib.init_params(config, 0)))


def find_step(path: str | Path, step: int | None = None) -> int | None:
    """`checkpoint.find_step` of a run; None of a Hugging Face folder.

    Raises:
      UserError: there is no such step, or a Hugging Face folder is asked for one.
    """
    if _is_run(Path(path)):
        return checkpoint.find_step(path, step)
    if step is not None:
        raise UserError(f"{path} is a Hugging Face folder, which has no steps")
    return None


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of the model in a run's folder or a Hugging Face folder.

    Raises:
      UserError: the folder is neither.
    """
    path = Path(path)
    if _is_run(path):
        # How attention is computed is a matter of the device that it is computed on, and FP8 one of training.
        return dataclasses.replace(checkpoint.read_config(path).model, attention="auto", fp8=False)
    if (path / "config.json").is_file():
        return huggingface.read_config(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: expected the folder of a run, or a Hugging Face folder")
    raise UserError(
        f"{path} is neither the folder of a run (it has no {checkpoint.CONFIG_FILE}) nor a Hugging "
        "Face folder (it has no config.json)"
    )


def model_defaults(path: str | Path) -> dict[str, Any]:
    """What the model in a folder is, and not how it is computed or trained, as settings by 'group.name'."""
    there = read_config(path)
    return {f"model.{name}": getattr(there, name) for name in (*_ARCHITECTURE, "initializer_range")}


def document_attention(path: str | Path) -> bool:
    """Whether a run was trained to attend within documents only; false of a Hugging Face folder, which cannot say."""
    if not _is_run(Path(path)):
        return False
    config = checkpoint.read_config(path)
    return isinstance(config, Config) and config.data.document_attention


def read_task(path: str | Path) -> FinetuneConfig | None:
    """The configuration of a fine-tuning run, or as much of it as goes into an export; None of other folders."""
    path = Path(path)
    if _is_run(path):
        config = checkpoint.read_config(path)
        return config if isinstance(config, FinetuneConfig) else None
    return huggingface.read_task(path) if (path / "config.json").is_file() else None


def load_params(path: str | Path, step: int | None = None, shardings: Params | None = None) -> Params:
    """The parameters in a run's folder or a Hugging Face folder, on one device unless `shardings` says otherwise.

    Those of a fine-tuned model have what LoRA trained merged in, and perhaps a head, as 'score'.

    Args:
      shardings: of all but a head.

    Raises:
      UserError: see `load_model`.
    """
    path = Path(path)
    task = read_task(path)
    if _is_run(path):
        return _load_finetuned(path, task, step, shardings) if task else checkpoint.load_params(path, step, shardings)
    find_step(path, step)  # refuses one
    head = huggingface.head_tensors(task) if task else ()
    flat = traverse_util.flatten_dict(huggingface.load_params(path, head)[1], sep="/")
    where = _on_mesh_of(shardings, flat) or dict.fromkeys(flat)
    # One at a time, so that the model is never in memory twice.
    return traverse_util.unflatten_dict({name: _place(flat.pop(name), where[name]) for name in list(flat)}, sep="/")


def _load_finetuned(path: Path, config: FinetuneConfig, step: int | None, shardings: Params | None) -> Params:
    lie = functools.partial(_on_mesh_of, shardings)
    abstract, _ = adaptation.abstract_start(config)
    step = checkpoint.find_step(path, step)
    trained = checkpoint.restore_params(path, step, abstract, lie(abstract))
    if not adaptation.lora_of(config):
        return trained
    base, _ = load_base(path, config, checkpoint.read_metadata(path, step).get("base"), shardings)
    finish = functools.partial(adaptation.finish, config)
    return jax.jit(finish, out_shardings=lie(jax.eval_shape(finish, trained, base)))(trained, base)


def _on_mesh_of(shardings: Params | None, params: Params) -> Params | None:
    """How parameters lie on the mesh of other ones."""
    return sharding.tree_shardings(jax.tree.leaves(shardings)[0].mesh, params) if shardings else None


def _place(array: np.ndarray, where: jax.sharding.Sharding | None) -> Array:
    return jax.device_put(array) if where is None else sharding.put(array, where)


def start_from(
    path: str | Path,
    config: ModelConfig,
    shardings: Params | None = None,
    but_words: bool = False,
    step: int | None = None,
) -> Params:
    """The parameters in a folder, without a head, for a model of another run, which must have the same architecture.

    Args:
      but_words: whether the number of words may differ.
      step: which checkpoint of a run; by default the newest, of fine-tuning the best.

    Raises:
      UserError: names the first setting that differs; or see `load_model`.
    """
    check_architecture(path, config, but_words)
    return heads.without_head(load_params(path, step, shardings))


def load_base(
    run_dir: str | Path, config: FinetuneConfig, known: dict[str, Any] | None, shardings: Params | None = None
) -> tuple[Params, dict[str, Any]]:
    """The weights that a run of fine-tuning starts from, and what tells them from others: their step and a checksum.

    A folder that is not at run.init_from any more may lie beside the run's.

    Args:
      known: what told the weights that the run did start from; None at its start.

    Raises:
      UserError: they are not there any more; see `start_from`.
    """
    folder = Path(config.run.init_from)
    beside = Path(run_dir).absolute().parent / folder.name
    folder = beside if beside.exists() and not folder.exists() else folder
    try:
        step = known["step"] if known else find_step(folder)
        params = start_from(folder, config.model, shardings, but_words=True, step=step)
        found = {"step": step, "checksum": adaptation.checksum(params)}
        if known and found != known:
            raise UserError(f"{folder} has other weights than it had")
    except UserError as error:
        if not known:
            raise
        raise UserError(f"{run_dir} holds what LoRA trained beside the weights of run.init_from: {error}") from error
    return params, found


def check_architecture(path: str | Path, config: ModelConfig, but_words: bool = False) -> None:
    """Refuses a folder whose model is of another architecture; see `start_from`."""
    there = read_config(path)
    for name in _ARCHITECTURE:
        if but_words and name == "vocab_size":
            continue
        if getattr(there, name) != getattr(config, name):
            raise UserError(
                f"run.init_from {path}: model.{name} is {getattr(there, name)} there and {getattr(config, name)} here"
            )


def check_weights(path: str | Path) -> None:
    """Refuses a folder whose weights are missing or not those of its configuration, in a moment: it reads none."""
    if _is_run(Path(path)):
        checkpoint.find_step(path)
    else:
        task = read_task(path)
        huggingface.check_weights(path, huggingface.head_tensors(task) if task else ())


def load_tokenizer(path: str | Path) -> tokenizer_lib.Tokenizer:
    """The tokenizer beside the model in a run's folder or a Hugging Face folder.

    Raises:
      UserError: there is none, its files are broken, or it has words that the model does not know.
    """
    return _load_tokenizer(_tokenizer_dir(Path(path)), read_config(path))


def _load_tokenizer(directory: Path, config: ModelConfig) -> tokenizer_lib.Tokenizer:
    tokenizer = tokenizer_lib.load_tokenizer(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} words, and the model {config.vocab_size}"
        )
    return tokenizer


def _tokenizer_dir(path: Path) -> Path:
    return path / checkpoint.TOKENIZER_FOLDER if _is_run(path) else path


def _is_run(path: Path) -> bool:
    return (path / checkpoint.CONFIG_FILE).is_file()
