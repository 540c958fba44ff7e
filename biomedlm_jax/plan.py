"""Command: what a run needs and how long it takes, on devices that are not here.

    python -m biomedlm_jax.plan --config configs/biomedlm_2_7b.yaml --target a100-40gb:16x8

Compiles the very step that `train` runs with the same settings, and prints memory, exchange, time, energy and cost.
"""

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

from etils import epy

from biomedlm_jax import config as config_lib
from biomedlm_jax import targets
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError, run_command
from biomedlm_jax.files import check_output
from biomedlm_jax.finetune_config import FinetuneConfig

# `--help` and mistakes in the settings answer before these are loaded.
with epy.lazy_imports():
    from biomedlm_jax import load
    from biomedlm_jax.planning import compiled as compiled_lib
    from biomedlm_jax.planning import drawing, report, search

logger = logging.getLogger("biomedlm_jax.plan")


def main() -> int:
    """Prints the plan of the command line; the exit status is 1 if the run does not fit."""
    config, options = _parse_args()
    check_output("--plot", options.plot)
    if options.price is not None and options.price < 0:
        raise UserError(f"--price must not be negative, not {options.price:g}")
    target = targets.parse(options.target)
    targets.keep_off_devices()
    if options.search:
        return _search(config, target, options)
    try:
        compiled = compiled_lib.compile_step(config, target)
    except compiled_lib.OutOfMemory as error:
        # TPUs: the compiler gives up, and there is nothing else to tell.
        needed = f"{error.memory_bytes / 1e9:.1f} GB" if error.memory_bytes else "more memory than there is"
        print(f"does not fit: the compiler for {target} needs {needed} of a device", file=sys.stderr)
        advice = _advise(config, target, None)
        if options.json:
            memory = {"total": error.memory_bytes, "limit": report.memory_limit(target), "fits": False}
            print(json.dumps({"target": str(target), "memory": memory, "nearest_that_fits": advice}, indent=2))
        return 1
    plan = report.make_plan(compiled, options.price)
    if options.plot:
        drawing.draw(plan, options.plot)
    if not options.json:
        print(report.as_text(plan), flush=True)
    advice = None if plan.fits else _advise(config, target, compiled)
    if options.json:
        print(json.dumps(plan.as_dict() | ({} if plan.fits else {"nearest_that_fits": advice}), indent=2))
    return 0 if plan.fits else 1


def _parse_args() -> tuple[Config | FinetuneConfig, Any]:
    """The settings of a run of pretraining, or of fine-tuning if there are any of group task, and the options."""
    kind: type = Config
    defaults: dict[str, Any] = {}
    if config_lib.has_group("task"):
        kind = FinetuneConfig
        init_from = config_lib.peek("run.init_from", kind, add_options=_add_options)
        # What a run would start from need not be here; its sizes are then the published model's.
        if init_from and Path(init_from).is_dir():
            defaults = load.model_defaults(init_from)
    description = "Predict memory, exchange, time and cost of a run on devices that are not here."
    return config_lib.parse_args_with("plan", description, _add_options, None, kind, defaults)


def _advise(config: Config | FinetuneConfig, target: targets.Target, compiled: Any) -> str | None:
    """The options that make the run fit, also said to the user; None if none do."""
    logger.info("looking for the nearest setting that fits")
    plan = search.nearest_fit(config, target, compiled)
    if plan is None:
        print(f"no setting fits into {target}: take more devices, or larger ones", file=sys.stderr)
        return None
    options = search.changes(config, plan.compiled.config)
    gigabytes = plan.compiled.memory_bytes / 1e9
    print(f"the nearest that fits, {gigabytes:.1f} GB, {plan.mfu:.1%} MFU: {options}", file=sys.stderr)
    return options


def _search(config: Config | FinetuneConfig, target: targets.Target, options: Any) -> int:
    compiled_lib.check(config, target)
    plans = search.search(config, target)
    if not plans:
        print(f"nothing that was tried fits into {target}", file=sys.stderr)
        return 1
    plans = [dataclasses.replace(plan, price=options.price) for plan in plans]
    if options.plot:
        drawing.draw(plans[0], options.plot)
    if options.json:
        print(json.dumps(search.as_dicts(config, plans), indent=2))
    else:
        print("\n".join(search.search_table(config, plans)))
        print("\nthe first of them\n")
        print(report.as_text(plans[0]))
    return 0


def _add_options(parser: Any) -> None:
    parser.add_argument(
        "--target",
        required=True,
        metavar="T",
        help="a100-40gb:16x8 (hosts x GPUs a host), tpu-v5p:4x4x8 (a slice's topology); there are "
        + ", ".join(targets.CHIPS),
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="Try recomputation, sequences at once, replicas and unrolling; rank what fits (minutes).",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON: bytes, seconds, FLOPs.")
    parser.add_argument("--price", type=float, metavar="P", help="Price of an hour of one device, in any currency.")
    parser.add_argument("--plot", metavar="FILE.png", help="Draw memory and the step's timeline.")


if __name__ == "__main__":
    run_command(main)
