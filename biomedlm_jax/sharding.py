"""The mesh (replica, fsdp), and one table from parameter to PartitionSpec.

Fully sharded data parallelism: each device holds a slice of every parameter and of both its moments, gathers a
layer's parameters when it computes that layer, and reads its own rows of the batch. `replica` > 1 copies the
sharded model, so that only `fsdp` devices exchange parameters.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from biomedlm_jax.config import Config, MeshConfig
from biomedlm_jax.errors import UserError

# Rows of the batch go to all devices.
BATCH_SPEC = P(("replica", "fsdp"))

# What follows a parameter's path decides; the first axis of everything in `h` is the layer.
# The embeddings are split by width: 28,896 words do not divide by 64 or 128 devices, 2,560 does.
_PARAM_SPECS = (
    (r"(wte|wpe)/embedding", P(None, "fsdp")),
    (r"h/.*/kernel", P(None, "fsdp", None)),
    (r"h/.*/(bias|scale)", P(None, "fsdp")),
    (r"ln_f/(bias|scale)", P("fsdp")),
)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of `devices`.

    Raises:
      UserError: replica x fsdp is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    replica, fsdp = config.replica, config.fsdp
    if fsdp == -1:
        fsdp = max(1, len(devices) // replica)
    if replica * fsdp != len(devices):
        raise UserError(
            f"mesh.replica x mesh.fsdp must be the number of devices: {replica} x {fsdp} is not "
            f"{len(devices)} ({devices[0].device_kind})"
        )
    return jax.make_mesh((replica, fsdp), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_divisible(config: Config, mesh: Mesh) -> None:
    """Refuses a configuration whose arrays do not split evenly over the mesh.

    Raises:
      UserError: names the setting and the sizes.
    """
    fsdp, devices = mesh.shape["fsdp"], mesh.size
    if config.model.n_embd % fsdp:
        raise UserError(
            f"model.n_embd ({config.model.n_embd}) must be a multiple of mesh.fsdp ({fsdp}), over which "
            "parameters are split; choose mesh.fsdp and mesh.replica accordingly"
        )
    micro_batch = config.train.global_batch_size // config.train.gradient_accumulation_steps
    if micro_batch % devices:
        raise UserError(
            f"train.global_batch_size / train.gradient_accumulation_steps ({config.train.global_batch_size} "
            f"/ {config.train.gradient_accumulation_steps}) must be a multiple of the {devices} devices"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch's rows lie on the mesh."""
    return NamedSharding(mesh, BATCH_SPEC)


def constrain_rows(x: Shaped[Array, "batch *rest"]) -> Shaped[Array, "batch *rest"]:
    """Keeps the rows of an activation on the devices that hold the batch's, under a mesh set by `jax.set_mesh`.

    Left alone, the compiler may split activations like the parameters that they meet, and exchange those instead.
    """
    spec = rows_spec(x.shape[0])
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def rows_spec(rows: int) -> P | None:
    """How so many rows lie on the mesh set by `jax.set_mesh`; None without one, and inside a `shard_map` over it.

    Raises:
      UserError: they do not divide over its devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.manual_axes) & set(BATCH_SPEC[0]):
        return None
    if rows % mesh.size:
        raise UserError(f"a batch of {rows} rows does not divide over the {mesh.size} devices of the mesh")
    return BATCH_SPEC


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each leaf of a parameter tree, or of a tree that holds some (a train state).

    A leaf is known by the end of its path, so the optimizer's moments lie as their parameters do; scalars, and
    only scalars, are replicated.

    Raises:
      KeyError: a leaf is neither in the table nor a scalar.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)),
        tree,
    )


def _spec(path: str, leaf: Any) -> P:
    if np.ndim(leaf) == 0:
        return P()
    for pattern, spec in _PARAM_SPECS:
        if re.search(rf"(^|/){pattern}$", path):
            return spec
    raise KeyError(f"no sharding is known for {path}")
