import jax
import jax.numpy as jnp
import kernels
import numpy as np
import pytest
from jax.experimental import pallas as pl

from biomedlm_jax.devices import Device
from biomedlm_jax.kernels import triton
from biomedlm_jax.kernels.flash_attention import flash_attention

# Small, and wider or narrower than the tiles, so that a few hundred positions have all kinds of blocks.
BLOCKS = triton.Blocks(64, 16, 4, 2, 32, 64, 4, 2, 16, 32, 4, 2)


def attention(qkv, scale, segment_ids):
    return flash_attention(qkv, scale, segment_ids, backend="triton", interpret=True, blocks=BLOCKS)


@pytest.mark.parametrize("index, shape", list(enumerate(kernels.draw_shapes(seed=3, n=12))))
def test_equals_reference(index, shape):
    """Each kind of length with each type, in turn with documents, and with the usual scale or the smallest."""
    dtype = ("float32", "bfloat16", "float16")[index % 3]
    segment_ids = kernels.draw_segment_ids(index, *shape[:2]) if (index + index // 4) % 2 else None
    scale = kernels.SMALLEST_SCALE if index // 3 % 2 else shape[3] ** -0.5
    kernels.check("triton", shape, dtype, scale, segment_ids, blocks=BLOCKS)


@pytest.mark.parametrize("head_dim, dtype", [(64, "float32"), (64, "bfloat16"), (128, "float32"), (128, "bfloat16")])
def test_equals_reference_with_default_blocks(head_dim, dtype):
    kernels.check("triton", (1, 290, 1, head_dim), dtype, head_dim**-0.5, kernels.draw_segment_ids(5, 1, 290))


def test_negative_scale():
    kernels.check("triton", (1, 100, 1, 64), "float32", -0.2, blocks=BLOCKS)


def test_zero_scale_gives_the_mean():
    qkv, d_out = kernels.draw_arguments(0, (1, 70, 1, 64), "float32")
    out, _, _ = kernels.attention_and_gradients(attention, qkv, 0.0, None, d_out)
    mean = jnp.cumsum(qkv[:, :, 2:], axis=1) / jnp.arange(1, 71)[:, None, None]
    np.testing.assert_allclose(out, mean, rtol=1e-5, atol=1e-6)


def test_other_blocks_are_skipped_not_masked():
    """Not a number in a document or past the diagonal would stay one under a mask, whose products are with 0."""
    qkv, d_out = kernels.draw_arguments(0, (1, 256, 1, 64), "float32")
    poisoned = qkv.at[:, :64].set(jnp.nan).at[:, 192:].set(jnp.nan)
    segment_ids = jnp.repeat(jnp.arange(4), 64)[None]

    expected = kernels.attention_and_gradients(attention, qkv, 0.1, segment_ids, d_out)
    results = kernels.attention_and_gradients(attention, poisoned, 0.1, segment_ids, d_out)
    for x, y in zip(results[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(x[:, 64:192], y[:, 64:192])
    # Without documents the last positions are past the diagonal of all others.
    expected = kernels.attention_and_gradients(attention, qkv, 0.1, None, d_out)
    results = kernels.attention_and_gradients(attention, qkv.at[:, 192:].set(jnp.nan), 0.1, None, d_out)
    np.testing.assert_array_equal(results[0][:, :192], expected[0][:, :192])
    np.testing.assert_array_equal(results[1][:, :192, 0], expected[1][:, :192, 0])


def test_interpreter_poisons_what_no_kernel_writes():
    """What the comparisons with the reference rest on: an element left unwritten is not a number."""
    out = pl.pallas_call(lambda ref: None, out_shape=jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), interpret=True)()
    assert jnp.isnan(out).all()


def test_float32_products_are_not_rounded_to_tf32():
    """CPUs have no TF32, so the comparisons cannot see it: the compiler for GPUs must be told."""
    qkv = jnp.zeros((1, 64, 3, 64))
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda qkv: attention(qkv, 1.0, None).sum()))(qkv))
    # Two loops of 2, 3 and 4 products.
    assert jaxpr.count("dot_general[") == jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 18


def test_default_blocks_are_powers_of_2():
    for head_dim in (64, 128):
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            blocks = triton.default_blocks((1, 1024, 3, head_dim), dtype)
            rows = (blocks.forward_q, blocks.forward_k, blocks.dq_q, blocks.dq_k, blocks.dkv_q, blocks.dkv_k)
            assert all(size >= 16 and size & (size - 1) == 0 for size in rows)


def test_limits_name_what_was_given_and_what_is_allowed():
    assert not triton.device_limit(Device("gpu", "NVIDIA A100-SXM4-40GB", 8.0, 108))
    assert triton.device_limit(Device("gpu", "Tesla V100", 7.0, 80)) == (
        "runs on NVIDIA GPUs of compute capability 8.0 or more, and this is Tesla V100"
    )
    assert triton.device_limit(Device("tpu", "TPU v5", 0, 1)).endswith("this is TPU v5")
    shape = (1, 8, 3, 128)
    assert not triton.limit(jax.ShapeDtypeStruct(shape, jnp.float16))
    assert triton.limit(jax.ShapeDtypeStruct((1, 8, 3, 80), jnp.float16)) == "takes head sizes 64 and 128, not 80"
    assert triton.limit(jax.ShapeDtypeStruct(shape, jnp.int8)) == "takes bfloat16, float16, float32, not int8"
