"""Other settings for the same run: the nearest that fits into memory, and which of those that fit are fastest."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

from tqdm import tqdm

from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import LENGTH_MULTIPLE, FinetuneConfig
from biomedlm_jax.planning import report
from biomedlm_jax.planning.compiled import CompiledStep, OutOfMemory, check, compile_step
from biomedlm_jax.planning.report import Plan
from biomedlm_jax.targets import Target

logger = logging.getLogger(__name__)

# What recomputation costs, from none to all.
_REMAT: tuple[Literal["none", "matmuls", "full"], ...] = ("none", "matmuls", "full")
_CHUNK = 256
_MOST_PARTS = 64


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
    """What may change without changing what is learnt; each field from what needs most memory to what needs least."""

    remat: int
    """Place in none, matmuls, full."""
    halvings: int
    """How often the sequences at once are halved from all of a step's."""
    chunked: bool
    """Whether the logits are computed in chunks."""
    fsdp: int
    unroll: int = 1

    def at_least(self, other: "Setting") -> bool:
        """Whether it needs no more memory than another, as far as one can tell without compiling either."""
        pairs = zip(dataclasses.astuple(self)[:4], dataclasses.astuple(other)[:4], strict=True)
        return all(mine >= theirs for mine, theirs in pairs)

    @property
    def cost(self) -> float:
        """A guess at how much slower it makes a step, for the order of what is tried."""
        return (0, 1, 4)[self.remat] + 1.5 * self.halvings + 0.5 * self.chunked

    def apply(self, config: Config | FinetuneConfig, target: Target) -> Config | FinetuneConfig:
        """The configuration with this setting."""
        train: Any = config.train
        most = LENGTH_MULTIPLE if isinstance(config, FinetuneConfig) else _CHUNK
        positions = config.model.n_positions
        chunk = train.loss_chunk or (most if positions % most == 0 else positions)
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, remat=_REMAT[self.remat], unroll=self.unroll),
            mesh=dataclasses.replace(config.mesh, replica=target.size // self.fsdp, fsdp=self.fsdp),
            train=dataclasses.replace(
                train, gradient_accumulation_steps=2**self.halvings, loss_chunk=chunk if self.chunked else 0
            ),
        )


def setting_of(config: Config | FinetuneConfig, target: Target) -> Setting:
    """The setting of a configuration."""
    halvings = config.train.gradient_accumulation_steps.bit_length() - 1
    return Setting(
        _REMAT.index(config.model.remat),
        halvings,
        bool(config.train.loss_chunk),
        target.size // config.mesh.replica,
        config.model.unroll,
    )


def changes(before: Config | FinetuneConfig, after: Config | FinetuneConfig) -> str:
    """The options of the command line that turn one configuration into the other."""
    found = []
    for group in ("model", "train", "mesh"):
        old, new = (dataclasses.asdict(getattr(config, group)) for config in (before, after))
        found += [f"--{group}.{name} {value}" for name, value in new.items() if old[name] != value]
    if before.mesh.fsdp == -1 and before.mesh.replica == after.mesh.replica:
        found = [change for change in found if not change.startswith("--mesh.fsdp")]
    return " ".join(found)


Compile = Callable[[Config | FinetuneConfig, Target], CompiledStep]


def nearest_fit(
    config: Config | FinetuneConfig, target: Target, compiled: CompiledStep | None, compile_one: Compile = compile_step
) -> Plan | None:
    """The plan of the first setting that fits, tried from what costs least time to what costs most; None if none does.

    Args:
      compiled: the step that does not fit; None if not even its compiler got through.
    """
    start = setting_of(config, target)
    settings = itertools.starmap(
        Setting,
        itertools.product(
            range(start.remat, len(_REMAT)),
            range(start.halvings, _MOST_PARTS.bit_length()),
            sorted({start.chunked, True}),
            sorted({start.fsdp, target.size}),
            (start.unroll,),
        ),
    )
    candidates = {
        setting: applied for setting in settings if setting != start and (applied := _applied(setting, config, target))
    }
    if not candidates:
        return None
    # If the setting that needs least does not fit, none does.
    strongest = max(candidates)
    last = _try(candidates[strongest], target, compile_one)
    if last is None or not last.fits:
        return None
    too_large = [start]
    for setting in sorted(candidates, key=lambda setting: setting.cost):
        if setting == strongest:
            return last
        if any(other.at_least(setting) for other in too_large) or _hopeless(setting, start, compiled, target):
            continue
        plan = _try(candidates[setting], target, compile_one)
        if plan is not None and plan.fits:
            return plan
        too_large.append(setting)
    return last


def _hopeless(setting: Setting, start: Setting, compiled: CompiledStep | None, target: Target) -> bool:
    """Whether activations, shrunk as the sequences at once do, must still be too large."""
    if compiled is None or setting.remat != start.remat or setting.chunked != start.chunked:
        return False
    activations = compiled.memory["saved activations"]
    others = compiled.memory_bytes - sum(
        compiled.memory[part] for part in ("saved activations", "logits", "workspace", "gaps, batch, code")
    )
    limit = report.memory_limit(target)
    return others + activations / 2 ** (setting.halvings - start.halvings) > limit


def _applied(setting: Setting, config: Config | FinetuneConfig, target: Target) -> Config | FinetuneConfig | None:
    """The configuration with a setting; None if it does not divide."""
    try:
        applied = setting.apply(config, target)
        check(applied, target)
    except UserError:
        return None
    return applied if config.model.n_embd % setting.fsdp == 0 else None


def _try(config: Config | FinetuneConfig, target: Target, compile_one: Compile) -> Plan | None:
    train, model = config.train, config.model
    rows = train.global_batch_size // train.gradient_accumulation_steps // target.size
    label = (
        f"remat {model.remat}, {rows} sequences at once, loss_chunk {train.loss_chunk}, replica {config.mesh.replica}, "
        f"unroll {model.unroll}"
    )
    try:
        plan = report.make_plan(compile_one(config, target))
    except OutOfMemory as error:
        needed = f"{error.memory_bytes / 1e9:.1f} GB" if error.memory_bytes else "more memory than there is"
        logger.info("%s: %s", label, needed)
        return None
    fits = f"{plan.mfu:.1%} MFU" if plan.fits else "too much"
    logger.info("%s: %.1f GB, %s", label, plan.compiled.memory_bytes / 1e9, fits)
    return plan


def search(config: Config | FinetuneConfig, target: Target, compile_one: Compile = compile_step) -> list[Plan]:
    """The plans of all that fits of recomputation x sequences at once x replicas x unrolling, the fastest first.

    Of each combination of the others only the most sequences at once that fit are kept: fewer are slower.
    """
    replicas = sorted({1, config.mesh.replica, _sensible_replicas(target)})
    unrolls = sorted({1, 2, config.model.unroll})
    groups = list(itertools.product(range(len(_REMAT)), replicas, unrolls))
    plans = []
    with tqdm(groups, desc="searching", unit=" combinations", disable=None) as bar:
        for remat, replica, unroll in bar:
            if target.size % replica:
                continue
            for halvings in range(_MOST_PARTS.bit_length()):
                setting = Setting(remat, halvings, bool(config.train.loss_chunk), target.size // replica, unroll)
                candidate = _applied(setting, config, target)
                plan = _try(candidate, target, compile_one) if candidate else None
                if plan is not None and plan.fits:
                    plans.append(plan)
                    break
    return sorted(plans, key=lambda plan: plan.time.seconds)


def _sensible_replicas(target: Target) -> int:
    """GPUs: a copy of the model in each host. TPUs: one on every 32 chips, whose shards are whole tiles."""
    return target.dims[0] if target.chip.platform == "gpu" else max(1, target.size // 32)


def search_table(config: Config | FinetuneConfig, plans: list[Plan]) -> Iterator[str]:
    """The found settings for a terminal."""
    yield f"{'':4}{'step ms':>9}{'MFU':>7}{'days':>8}{'GB':>7}  {'limit':10} settings"
    for rank, plan in enumerate(plans, 1):
        options = changes(config, plan.compiled.config) or "as given"
        yield (
            f"{rank:3} {plan.time.seconds * 1e3:9.0f}{plan.mfu:7.1%}{plan.days:8.2f}"
            f"{plan.compiled.memory_bytes / 1e9:7.1f}  {plan.time.limit:10} {options}"
        )


def as_dicts(config: Config | FinetuneConfig, plans: list[Plan]) -> list[dict[str, Any]]:
    """The found settings for JSON."""
    return [{"options": changes(config, plan.compiled.config)} | plan.as_dict() for plan in plans]
