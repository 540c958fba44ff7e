"""Compiles the step that `train` runs for devices that are not here, and reads off what it needs."""

import dataclasses
import functools
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from biomedlm_jax import adaptation, data, fp8, heads, hlo, sharding, step
from biomedlm_jax.config import Config, OptimizerConfig, TrainConfig
from biomedlm_jax.encoding import padded_length
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import GENERATION, MULTIPLE_CHOICE, FinetuneConfig
from biomedlm_jax.planning import flops, memory, traffic
from biomedlm_jax.targets import Target

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A training step as compiled for a target; all numbers are of one device."""

    config: Config | FinetuneConfig
    target: Target
    mesh: dict[str, int]
    devices: list[Any]
    """In the order of the mesh."""
    memory: dict[str, int]
    """Bytes by `memory.PARTS`."""
    products: list[flops.Product]
    accesses: list[traffic.Access]
    collectives: list[hlo.Collective]
    unknown: tuple[str, ...]
    """What could not be read off, in sentences."""

    @property
    def run(self) -> Config:
        """The run of pretraining whose steps have the same shapes."""
        return as_pretraining(self.config)

    @property
    def memory_bytes(self) -> int:
        """All memory that it needs."""
        return sum(self.memory.values())


class OutOfMemory(Exception):
    """The compiler found that a step does not fit; `memory_bytes` is what it says that is needed, 0 if it says none."""

    def __init__(self, memory_bytes: int):
        super().__init__(memory_bytes)
        self.memory_bytes = memory_bytes


def as_pretraining(config: Config | FinetuneConfig) -> Config:
    """A run of pretraining with rows as many and as long as the longest of a fine-tuning's steps."""
    if isinstance(config, Config):
        return config
    train = config.train
    return Config(
        model=dataclasses.replace(config.model, n_positions=_row_tokens(config)),
        optimizer=OptimizerConfig(warmup_steps=0),
        mesh=config.mesh,
        train=TrainConfig(
            steps=max(1, train.steps),
            global_batch_size=train.global_batch_size * _choices(config),
            gradient_accumulation_steps=train.gradient_accumulation_steps,
        ),
    )


def _row_tokens(config: FinetuneConfig) -> int:
    return padded_length(config.task.longest, config.model.n_positions, whole_chunks=config.task.name in GENERATION)


def _choices(config: FinetuneConfig) -> int:
    """Rows of an example; questions of multiple choice mostly have four."""
    return 4 if config.task.name in MULTIPLE_CHOICE else 1


def check(config: Config | FinetuneConfig, target: Target) -> None:
    """Refuses what cannot be compiled, before anything is.

    Raises:
      UserError: the mesh does not multiply to the number of devices, or the batch does not divide over them.
    """
    sharding.mesh_shape(config.mesh, target.size, f"the {target.size:,} of {target}")
    batch, parts = config.train.global_batch_size, config.train.gradient_accumulation_steps
    rows = batch // parts
    at_once = f"{batch:,} sequences" + (f" in {parts} parts are {rows:,} at once" if parts > 1 else "")
    if rows < target.size:
        remedy = "raise train.global_batch_size"
        if parts > 1:
            remedy = "lower train.gradient_accumulation_steps"
        raise UserError(
            f"{target} has {target.size:,} devices and a step only {at_once}: devices would have none; {remedy}, or "
            "take fewer devices"
        )
    if rows % target.size:
        raise UserError(
            f"the batch does not divide over {target}: {at_once}, not a multiple of {target.size:,} devices; change "
            "train.global_batch_size or train.gradient_accumulation_steps"
        )


def compile_step(config: Config | FinetuneConfig, target: Target) -> CompiledStep:
    """Compiles a training step.

    Raises:
      UserError: a package is missing, or the target's devices cannot compute the configuration.
      OutOfMemory: the compiler gave up for want of memory (TPUs only).
    """
    check(config, target)
    # What was compiled before must not stand in for the compiler: it leaves no dump.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # a process that has used it would go on to
    mesh = sharding.make_mesh(config.mesh, target.devices())
    sharding.check_divisible(config, mesh)
    fp8.check_devices(config.model, mesh)
    return compile_on(config, target, mesh)


def _program(config: Config | FinetuneConfig, mesh: Any) -> tuple[Any, tuple[Any, ...]]:
    """The compiled step of a run, and the shapes of what it takes."""
    rows, as_shape = sharding.batch_sharding(mesh), jax.ShapeDtypeStruct
    if isinstance(config, Config):
        state = jax.eval_shape(functools.partial(step.init_state, config))
        batch: Any = data.abstract_batch(config)
        return step.jit_train_step(config, sharding.tree_shardings(mesh, state), rows), (state, batch)
    trained, frozen = adaptation.abstract_start(config)
    state = jax.eval_shape(functools.partial(step.init_state, config), trained)
    size, choices, seq = config.train.global_batch_size, _choices(config), _row_tokens(config)
    if adaptation.scores_per_row(config):
        tokens, lengths = as_shape((size, choices, seq), jnp.int32), as_shape((size, choices), jnp.int32)
        labels, weights = as_shape((size,), jnp.int32), as_shape((size,), jnp.float32)
        batch = heads.Questions(tokens, lengths, labels, weights)  # type: ignore[arg-type]
    else:
        batch = step.Batch(as_shape((size, seq), jnp.int32), as_shape((size, seq), bool))  # type: ignore[arg-type]
    shardings = sharding.tree_shardings(mesh, state), sharding.tree_shardings(mesh, frozen) if frozen else None
    jitted = step.jit_train_step(config, shardings[0], rows, adaptation.objective(config), shardings[1])
    return jitted, (state, batch, *((frozen,) if frozen else ()))


def compile_on(config: Config | FinetuneConfig, target: Target, mesh: Any) -> CompiledStep:
    """`compile_step` for a mesh that is there already."""
    jitted, arguments = _program(config, mesh)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        traced = jitted.trace(*arguments)
        products = flops.products(traced.jaxpr.jaxpr, mesh.size)
        try:
            compiled = traced.lower().compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            raise _out_of_memory(error) from error
        dump, stats = memory.read_dump(Path(folder)), compiled.memory_analysis()
    unknown: list[str] = []
    accesses: list[traffic.Access] = []
    collectives: list[hlo.Collective] = []
    text = _as_text(compiled) or dump.hlo
    if text:
        module = hlo.parse(text)
        accesses, collectives = traffic.accesses(module), hlo.collectives(module)
        if module.unknown_loops:
            unknown.append(f"how often the loops {', '.join(module.unknown_loops)} run: they count once")
    else:
        unknown.append("the compiled program, which XLA cannot print: no exchange and no memory traffic is counted")
    if not dump.live_ranges or not dump.buffers:
        unknown.append("what is in memory when most of it is used: XLA wrote no dump of its buffers")
    if config.model.fp8:
        unknown.append("how much faster products in FP8 are, which was not measured: they count as in bfloat16")
    return CompiledStep(
        config=config,
        target=target,
        mesh=dict(mesh.shape),
        devices=list(mesh.devices.flat),
        memory=memory.parts(stats, dump, as_pretraining(config), mesh.shape["fsdp"], mesh.size),
        products=products,
        accesses=accesses,
        collectives=collectives,
        unknown=tuple(unknown),
    )


def _out_of_memory(error: Exception) -> Exception:
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        return error
    # "memory required for HLO temporaries (149.06G)", or "Used 17.53G of 15.75G hbm".
    found = re.search(r"\((\d+\.?\d*)G\) exceeds|[Uu]sed (\d+\.?\d*)G of", message)
    return OutOfMemory(int(float(found[1] or found[2]) * 2**30) if found else 0)


def _as_text(compiled: Any) -> str:
    """The optimized program; empty where XLA fails to print it (TPU, some asynchronous operations, jax 0.10.2)."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        logger.warning("XLA cannot print the program that it compiled: %s", str(error).splitlines()[0])
        return ""
