"""Command: what a run needs and how long it takes, on devices that are not here.

    python -m biomedlm_jax.plan --config configs/biomedlm_2_7b.yaml --target a100-40gb:16x8

Compiles the very step that `train` runs with the same settings, and prints memory, exchange, time, energy and cost.
"""

import json
import logging
from typing import Any

from etils import epy

from biomedlm_jax import config as config_lib
from biomedlm_jax import targets
from biomedlm_jax.errors import UserError, run_command

# `--help` and mistakes in the settings answer before these are loaded.
with epy.lazy_imports():
    from biomedlm_jax.planning import compiled as compiled_lib
    from biomedlm_jax.planning import report

logger = logging.getLogger("biomedlm_jax.plan")


def main() -> int:
    """Prints the plan of the command line; the exit status is 1 if the run does not fit."""
    config, options = config_lib.parse_args_with(
        "plan", "Predict memory, exchange, time and cost of a run on devices that are not here.", _add_options
    )
    if options.price is not None and options.price < 0:
        raise UserError(f"--price must not be negative, not {options.price:g}")
    target = targets.parse(options.target)
    plan = report.make_plan(compiled_lib.compile_step(config, target), options.price)
    print(json.dumps(plan.as_dict(), indent=2) if options.json else report.as_text(plan))
    return 0 if plan.fits else 1


def _add_options(parser: Any) -> None:
    parser.add_argument(
        "--target",
        required=True,
        metavar="T",
        help="a100-40gb:16x8 (hosts x GPUs a host), tpu-v5p:4x4x8 (a slice's topology); there are "
        + ", ".join(targets.CHIPS),
    )
    parser.add_argument("--json", action="store_true", help="Print JSON: bytes, seconds, FLOPs.")
    parser.add_argument("--price", type=float, metavar="P", help="Price of an hour of one device, in any currency.")


if __name__ == "__main__":
    run_command(main)
