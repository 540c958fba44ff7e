"""The mesh (replica, fsdp), one table from parameter to PartitionSpec, and what devices exchange in a step.

Fully sharded data parallelism: each device holds a slice of every parameter and of both its moments, gathers a
layer's parameters when it computes that layer, and reads its own rows of the batch. `replica` > 1 copies the
sharded model, so that only `fsdp` devices exchange parameters.

The exchange is written out, inside of a `shard_map`, and not left to the compiler's partitioner, which gathers in
float32 what could travel in bfloat16, and on TPUs reduces whole gradients on every device. No collective is
independent of a loop that holds others: XLA's backend for CPUs may start the two in another order on each device, and
then waits for ever.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from biomedlm_jax.config import Config, MeshConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import FinetuneConfig

AXES = ("replica", "fsdp")

# Rows of the batch go to all devices.
BATCH_SPEC = P(AXES)

# What follows a parameter's path decides; the first axis of everything in `h` is the layer.
# The embeddings are split by width: 28,896 words do not divide by 64 or 128 devices, 2,560 does.
_PARAM_SPECS = (
    (r"(wte|wpe)/embedding", P(None, "fsdp")),
    (r"h/.*/kernel", P(None, "fsdp", None)),
    (r"h/.*/lora_a", P(None, "fsdp", None)),
    (r"h/.*/lora_b", P(None, None, "fsdp")),  # its other width is the rank
    (r"h/.*/(bias|scale)", P(None, "fsdp")),
    (r"ln_f/(bias|scale)", P("fsdp")),
    (r"score/kernel", P("fsdp", None)),
)
# Those that are gathered a layer at a time.
_LAYER_KERNEL = re.compile(r"(^|/)h/.*/kernel$")


def mesh_shape(config: MeshConfig, count: int, named: str) -> tuple[int, int]:
    """Sizes of the mesh's axes, (replica, fsdp), for so many devices.

    Args:
      named: the devices, for users.

    Raises:
      UserError: replica x fsdp is not their number.
    """
    replica, fsdp = config.replica, config.fsdp
    if fsdp == -1:
        fsdp = max(1, count // replica)
    if replica * fsdp != count:
        raise UserError(f"mesh.replica x mesh.fsdp must be the number of devices: {replica} x {fsdp} is not {named}")
    return replica, fsdp


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of `devices`.

    Raises:
      UserError: replica x fsdp is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    replica, fsdp = mesh_shape(config, len(devices), f"{len(devices)} ({devices[0].device_kind})")
    axis_types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "tpu":
        # In the order of the torus, which `find_rings` needs. `jax.make_mesh` winds one long ring through some slices,
        # and knows no order for others that the sizes do not divide by its axes.
        order = sorted(devices, key=lambda device: (getattr(device, "slice_index", 0), *_place(device)[::-1]))
        return Mesh(np.array(order).reshape(replica, fsdp), AXES, axis_types=axis_types)
    return jax.make_mesh((replica, fsdp), AXES, axis_types=axis_types, devices=devices)


def _place(device: Any) -> tuple[int, ...]:
    """Where a TPU device is: its core of a chip, if chips have several, and the chip's place in the torus."""
    return (getattr(device, "core_on_chip", 0), *device.coords)


def check_divisible(config: Config | FinetuneConfig, mesh: Mesh) -> None:
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


def put(array: np.ndarray, where: jax.sharding.Sharding) -> Array:
    """An array that every process holds whole, laid out on devices.

    `jax.device_put` would first compare it between the processes.
    """
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


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
    if mesh.empty or set(mesh.manual_axes) & set(AXES):
        return None
    if rows % mesh.size:
        raise UserError(f"a batch of {rows} rows does not divide over the {mesh.size} devices of the mesh")
    return BATCH_SPEC


# Names of gathered weights, by which a checkpoint policy gathers them again for the backward pass, or keeps them.
GATHERED = "gathered"
GATHERED_AND_KEPT = "gathered_and_kept"

# Arrays that travel packed are cut into rows of this many elements, whole tiles of a TPU's memory in any type.
_PACKED_ROW = 16 * 128


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the devices of a mesh exchange parameters and gradients, inside of a `shard_map` over it."""

    rings: tuple[int, ...]
    """Sizes of the rings that `fsdp` devices form, the outermost first; (fsdp,) where all reach each other alike."""
    replica: int = 1
    """Copies of the sharded model."""
    dtype: Any = jnp.float32
    """The type that large parameters are gathered in."""
    reduce_dtype: Any = jnp.float32
    """The type that gradients of kernels are summed over devices in."""
    keep: bool = False
    """Whether weights gathered in the forward pass are kept for the backward pass."""

    @property
    def fsdp(self) -> int:
        """Devices that a copy of the model is sharded over."""
        return math.prod(self.rings)

    def all_gather(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """Every device's `x` along an axis, in the order of the devices."""
        for ring in reversed(self._exchanging):
            x = jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True, axis_index_groups=self._groups(ring))
        return x

    def reduce_scatter(self, x: Float[Array, "..."], axis: int = 0) -> Float[Array, "..."]:
        """Each device's part, along an axis, of the sum of all devices' `x`."""
        for ring in self._exchanging:
            x = jax.lax.psum_scatter(
                x, "fsdp", scatter_dimension=axis, tiled=True, axis_index_groups=self._groups(ring)
            )
        return x

    @property
    def _exchanging(self) -> list[int]:
        """The rings of more than one device; of an exchange with nobody, XLA for CPUs makes copies."""
        return [ring for ring, size in enumerate(self.rings) if size > 1]

    def _groups(self, ring: int) -> list[list[int]] | None:
        if len(self.rings) == 1:
            return None
        places = np.arange(self.fsdp).reshape(self.rings)
        return np.moveaxis(places, ring, -1).reshape(-1, self.rings[ring]).tolist()


def find_rings(mesh: Mesh) -> tuple[int, ...]:
    """Sizes of the rings of the TPU's torus that the mesh's `fsdp` axis runs along, outermost first; else (fsdp,).

    XLA for TPUs reduces and scatters along one axis of the torus; along several at once it reduces whole arrays on
    every device, which is twice the traffic.
    """
    devices = mesh.devices[0]
    if devices[0].platform != "tpu" or len(devices) == 1:
        return (len(devices),)
    places = np.array([_place(device) for device in devices])
    rings: list[int] = []
    stride = 1
    while stride < len(devices):
        moved = np.flatnonzero(places[stride] != places[0])
        if len(moved) != 1:
            return (len(devices),)
        # The ring ends where another coordinate changes.
        others = np.delete(places[::stride], moved[0], axis=1)
        changes = np.flatnonzero((others != others[0]).any(axis=1))
        size = int(changes[0]) if len(changes) else len(others)
        rings.insert(0, size)
        stride *= size
    return tuple(rings) if stride == len(devices) else (len(devices),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_kernel(exchange: Exchange, shard: Float[Array, "rows columns"]) -> Float[Array, "fsdp*rows columns"]:
    return exchange.all_gather(shard.astype(exchange.dtype))


def _gather_kernel_forward(exchange: Exchange, shard: Array) -> tuple[Array, None]:
    return _gather_kernel(exchange, shard), None


def _gather_kernel_backward(exchange: Exchange, _: None, gradient: Array) -> tuple[Array]:
    return (exchange.reduce_scatter(gradient.astype(exchange.reduce_dtype)).astype(jnp.float32),)


_gather_kernel.defvjp(_gather_kernel_forward, _gather_kernel_backward)


def gather_kernels(exchange: Exchange, layer: Any) -> Any:
    """One layer's parameters with its kernels whole, in the exchange's type; the other ones as they are.

    Each device gets its shard of a kernel's gradient in float32. `model.REMAT_POLICIES` know this function by being
    the only one with a gradient of its own whose first argument is a matrix, and by the name of its result.
    """
    name = GATHERED_AND_KEPT if exchange.keep else GATHERED

    def gather(path: Any, x: Array) -> Array:
        return checkpoint_name(_gather_kernel(exchange, x), name) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(gather, layer)


def gather_all_but_kernels(exchange: Exchange, params: Any) -> Any:
    """Parameters, or some of them, with all whole but the kernels of the layers, which are gathered a layer at a time.

    All travel packed, embeddings in the exchange's type, which rounds them, and vectors in float32; all come out in
    float32, so that their gradients, sums over many tokens, are taken and reduced in it.
    """
    if exchange.fsdp == 1:
        return params
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    packed = [i for i, path in enumerate(paths) if not _LAYER_KERNEL.search(path)]
    values = [leaf for _, leaf in leaves]
    axes = tuple(_param_spec(paths[i]).index("fsdp") for i in packed)
    large = tuple(paths[i].endswith("embedding") for i in packed)
    gathered = _gather_packed(exchange, axes, large, [values[i] for i in packed])
    for i, whole in zip(packed, gathered, strict=True):
        values[i] = whole
    return jax.tree_util.tree_unflatten(treedef, values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather_packed(
    exchange: Exchange, axes: tuple[int, ...], large: tuple[bool, ...], shards: list[Array]
) -> list[Array]:
    whole: list[Any] = [None] * len(shards)
    for kind, dtype in ((True, exchange.dtype), (False, jnp.float32)):
        chosen = [i for i, is_large in enumerate(large) if is_large == kind]
        if not chosen:
            continue
        parts = exchange.all_gather(_pack([shards[i].astype(dtype) for i in chosen]))
        parts = parts.reshape(exchange.fsdp, -1)
        start = 0
        for i in chosen:
            shape, size = shards[i].shape, shards[i].size
            by_device = parts[:, start : start + size].reshape(exchange.fsdp, *shape)
            start += size
            # [fsdp, ..., part, ...] to [..., fsdp * part, ...].
            moved = jnp.moveaxis(by_device, 0, axes[i])
            whole_shape = (*shape[: axes[i]], exchange.fsdp * shape[axes[i]], *shape[axes[i] + 1 :])
            whole[i] = moved.reshape(whole_shape).astype(jnp.float32)
    return whole


def _gather_packed_forward(exchange: Exchange, axes: Any, large: Any, shards: list[Array]) -> tuple[list[Array], None]:
    return _gather_packed(exchange, axes, large, shards), None


def _gather_packed_backward(
    exchange: Exchange, axes: tuple[int, ...], large: Any, _: None, gradients: list[Array]
) -> tuple[list[Array]]:
    by_device, shapes = [], []
    for gradient, axis in zip(gradients, axes, strict=True):
        parts = gradient.reshape(*gradient.shape[:axis], exchange.fsdp, -1, *gradient.shape[axis + 1 :])
        parts = jnp.moveaxis(parts, axis, 0)
        shapes.append(parts.shape[1:])
        by_device.append(parts)
    # One exchange of all: XLA for TPUs would merge several into one that it does not scatter. And a barrier behind it:
    # XLA would cut the pieces out of what it has reduced on every device, instead of scattering that.
    packed = exchange.reduce_scatter(jax.vmap(_pack)(by_device).reshape(-1, 128))
    packed = jax.lax.optimization_barrier(packed).reshape(-1)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return ([part.reshape(shape) for part, shape in zip(jnp.split(packed, ends)[:-1], shapes, strict=True)],)


_gather_packed.defvjp(_gather_packed_forward, _gather_packed_backward)


def _pack(arrays: Sequence[Array]) -> Shaped[Array, "rows 128"]:
    flat = jnp.concatenate([x.reshape(-1) for x in arrays])
    return jnp.pad(flat, (0, -flat.size % _PACKED_ROW)).reshape(-1, 128)


def tree_specs(tree: Any) -> Any:
    """How each leaf of a parameter tree, or of a tree that holds some, lies on the mesh; see `tree_shardings`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree
    )


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each leaf of a parameter tree, or of a tree that holds some (a train state).

    A leaf is known by the end of its path, so the optimizer's moments lie as their parameters do; scalars, and
    only scalars, are replicated.

    Raises:
      KeyError: a leaf is neither in the table nor a scalar.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree_specs(tree), is_leaf=lambda x: isinstance(x, P))


def _spec(path: str, leaf: Any) -> P:
    return P() if np.ndim(leaf) == 0 else _param_spec(path)


def _param_spec(path: str) -> P:
    for pattern, spec in _PARAM_SPECS:
        if re.search(rf"(^|/){pattern}$", path):
            return spec
    raise KeyError(f"no sharding is known for {path}")
