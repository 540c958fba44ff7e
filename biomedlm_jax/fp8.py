"""Products of matrices in FP8 with gradients in FP8, for training on NVIDIA Hopper and later.

Activations and weights are rounded to float8_e4m3fn, gradients to float8_e5m2 (https://arxiv.org/abs/2209.05433), each
array after division by one scale that follows from its own largest value at this moment: "current" or "dynamic" scaling
per tensor, as TransformerEngine's Float8CurrentScaling and torchao's tensorwise recipe have it. Nothing is remembered
between steps. Scales are powers of two, so that dividing by them rounds nothing.

What is written here are products of dequantized arrays. XLA for GPUs makes one cuBLASLt product of the arrays in FP8,
their scales and a bias (`__cublas$lt$matmul$f8`) of each; CPUs compute the same in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.fp8_ops import dequantize, get_fp8_max, quantize
from jax.sharding import Mesh
from jaxtyping import Array, Float

from biomedlm_jax.config import ModelConfig
from biomedlm_jax.devices import current_device
from biomedlm_jax.errors import UserError

OPERAND, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2

# An array in FP8, and its scale.
Quantized = tuple[Float[Array, "..."], Float[Array, ""]]

# CUDA compute capability of Hopper.
_CAPABILITY = 9.0


def check_devices(config: ModelConfig, mesh: Mesh) -> None:
    """Refuses `model.fp8` on devices that do not multiply in FP8; CPUs emulate it.

    Raises:
      UserError: names the device.
    """
    with jax.set_mesh(mesh):
        device = current_device()
    if config.fp8 and device.platform != "cpu" and device.capability < _CAPABILITY:
        raise UserError(f"model.fp8 needs an NVIDIA GPU of generation Hopper or later, and this is a {device.kind}")


def scale_of(x: Float[Array, "..."], dtype: Any) -> Float[Array, ""]:
    """The least power of two that brings all elements into the range of an FP8 type; float32.

    1 where all elements are 0, or hardly more; infinite where one is, of which quantizing makes nan.
    """
    least = jnp.abs(x).max().astype(jnp.float32) / get_fp8_max(dtype, jnp.float32)
    # Rounded up to a bare exponent; log2 and exp2 are not exact on every device.
    bits = (jax.lax.bitcast_convert_type(least, jnp.int32) + 0x7FFFFF) & 0x7F800000
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(scale == 0, 1, scale)


@jax.custom_vjp
def product(
    x: Float[Array, "*batch width_in"], kernel: Float[Array, "width_in width_out"]
) -> Float[Array, "*batch width_out"]:
    """`x` times `kernel`, both rounded to FP8, summed in float32, in the type of `x`, which must be that of `kernel`.

    Its gradients are such products as well. `x` has more than two axes, by which `model.REMAT_POLICIES` tell this from
    gathered kernels. Inside of a `shard_map` scales are of what a device holds.
    """
    return _product_forward(x, kernel)[0]


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, ...]]:
    x_scale, kernel_scale = scale_of(x, OPERAND), scale_of(kernel, OPERAND)
    x_fp8 = quantize(x, OPERAND, x_scale, x.dtype)
    kernel_fp8 = quantize(kernel, OPERAND, kernel_scale, x.dtype)
    out = _dot((x_fp8, x_scale), (kernel_fp8, kernel_scale), (x.ndim - 1,), (0,), x.dtype)
    # As bytes: what jax.checkpoint saves in a floating-point type it passes through `reduce_precision`, which takes the
    # highest exponent for infinity's, and so makes nan of e4m3fn's numbers above 240. A copy of the kernel would cost
    # memory where it is kept or gathered again (`sharding.gather_kernels`).
    return out, (jax.lax.bitcast_convert_type(x_fp8, jnp.uint8), x_scale, kernel, kernel_scale)


def _product_backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array]:
    x_bytes, x_scale, kernel, kernel_scale = kept
    x_fp8 = jax.lax.bitcast_convert_type(x_bytes, OPERAND)
    rows, dtype = tuple(range(gradient.ndim - 1)), gradient.dtype
    scale = scale_of(gradient, GRADIENT)
    gradient_fp8 = quantize(gradient, GRADIENT, scale, dtype)
    kernel_fp8 = quantize(kernel, OPERAND, kernel_scale, dtype)
    of_x = _dot((gradient_fp8, scale), (kernel_fp8, kernel_scale), (gradient.ndim - 1,), (1,), dtype)
    return of_x, _dot((x_fp8, x_scale), (gradient_fp8, scale), rows, rows, dtype)


product.defvjp(_product_forward, _product_backward)


def _dot(x: Quantized, y: Quantized, x_axes: tuple[int, ...], y_axes: tuple[int, ...], dtype: Any) -> Array:
    """The product along these axes, in `dtype`, in which dequantized arrays are exact.

    The highest precision keeps cuBLASLt from "fast accumulation", in which Hopper's tensor cores sum in 14 bits
    (https://arxiv.org/abs/2412.19437, section 3.3.2).
    """
    left, right = (dequantize(values, dtype, scale) for values, scale in (x, y))
    return jax.lax.dot_general(
        left, right, ((x_axes, y_axes), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype
    )
