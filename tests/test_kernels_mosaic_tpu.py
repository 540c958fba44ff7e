import dataclasses

import jax
import jax.numpy as jnp
import kernels
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from biomedlm_jax.devices import Device
from biomedlm_jax.kernels import mosaic_tpu, reference
from biomedlm_jax.kernels.documents import documents
from biomedlm_jax.kernels.flash_attention import flash_attention
from biomedlm_jax.kernels.mosaic_tpu import Blocks

SMALL = Blocks(128, 128, 128, 128)

# What nobody wrote is nan. Copies happen as late as they may, which shows in the results where one is not awaited.
ONE_CORE = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
# Copies happen at once: one that never happens races with nothing.
TWO_CORES = pltpu.InterpretParams(
    num_cores_or_threads=2, random_seed=0, detect_races=True, uninitialized_memory="nan", dma_execution_mode="eager"
)


@pytest.mark.parametrize("interpret", [True, ONE_CORE], ids=["plain", "tpu"])
@pytest.mark.parametrize("shape", kernels.draw_shapes(0, 5))
def test_random_shapes_in_float32(shape, interpret):
    ids = kernels.draw_segment_ids(1, *shape[:2])
    kernels.check("mosaic_tpu", shape, jnp.float32, shape[-1] ** -0.5, ids, interpret, SMALL)


@pytest.mark.parametrize("shape", [(2, 384, 2, 64), (1, 275, 2, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_at_the_smallest_scale(shape, packed):
    ids = kernels.draw_segment_ids(0, *shape[:2]) if packed else None
    kernels.check("mosaic_tpu", shape, jnp.bfloat16, kernels.SMALLEST_SCALE, ids, ONE_CORE, SMALL)


@pytest.mark.parametrize("blocks", [None, Blocks(128, 256, 256, 128), Blocks(256, 128, 128, 256)])
def test_blocks_of_all_kinds(blocks):
    ids = kernels.draw_segment_ids(2, 2, 600)
    kernels.check("mosaic_tpu", (2, 600, 1, 128), jnp.float32, 0.1, ids, ONE_CORE, blocks)


def passes(qkv, ids, interpret):
    """The output, and then the packed gradient of half the sum of its squares."""
    bounds = None if ids is None else documents(ids)
    scale = jnp.float32(0.1)
    forward, backward = (jax.jit(f, static_argnums=(-2, -1)) for f in (mosaic_tpu.forward, mosaic_tpu.backward))
    out, lse = forward(qkv, scale, bounds, SMALL, interpret)
    yield np.asarray(out)
    yield np.asarray(backward(qkv, scale, bounds, out, lse, out, SMALL, interpret))


@pytest.mark.parametrize("batch", [1, 2])
def test_no_races(batch):
    qkv, _ = kernels.draw_arguments(0, (batch, 300, 2, 128), jnp.float32)
    for _ in passes(qkv, kernels.draw_segment_ids(0, batch, 300), TWO_CORES):
        # Of the kernel that ran last.
        assert interpret_pallas_call.races.races_found is False


def test_the_order_of_parallel_steps_changes_no_bit():
    qkv, _ = kernels.draw_arguments(0, (2, 300, 2, 64), jnp.bfloat16)
    ids = kernels.draw_segment_ids(0, 2, 300)
    orders = (passes(qkv, ids, dataclasses.replace(ONE_CORE, random_seed=seed)) for seed in (0, 1))
    for first, second in zip(*orders, strict=True):
        np.testing.assert_array_equal(first, second)


def test_blocks_above_the_diagonal_are_not_computed():
    # If they were, though masked, they would give 0 * nan.
    qkv, _ = kernels.draw_arguments(0, (1, 384, 1, 128), jnp.float32)
    out, d_qkv = passes(qkv.at[:, 256:].set(jnp.nan), None, True)
    expected, d_expected = passes(qkv, None, True)
    np.testing.assert_array_equal(out[:, :256], expected[:, :256])
    np.testing.assert_array_equal(d_qkv[:, :256, 0], d_expected[:, :256, 0])


@pytest.mark.parametrize("spoilt", [slice(0, 256), slice(256, 384)])
def test_blocks_of_other_documents_are_not_computed(spoilt):
    qkv, _ = kernels.draw_arguments(0, (1, 384, 1, 128), jnp.float32)
    ids = jnp.arange(384)[None] // 256
    for results, expected in zip(
        passes(qkv.at[:, spoilt].set(jnp.nan), ids, True), passes(qkv, ids, True), strict=True
    ):
        kept = np.setdiff1d(np.arange(384), np.arange(384)[spoilt])
        np.testing.assert_array_equal(results[:, kept], expected[:, kept])


@pytest.mark.parametrize(
    ("device", "limit"),
    [
        (Device("tpu", "TPU v4", 0, 1), ""),
        (Device("tpu", "TPU v5 lite", 0, 1), ""),
        (Device("tpu", "TPU v5", 0, 1), ""),
        (Device("tpu", "TPU v6 lite", 0, 1), ""),
        (Device("tpu", "TPU v3", 0, 1), "runs on TPUs from v4 on, and this is TPU v3"),
        (Device("gpu", "NVIDIA H200", 9.0, 1), "runs on TPUs from v4 on, and this is NVIDIA H200"),
    ],
)
def test_devices(device, limit):
    assert mosaic_tpu.device_limit(device) == limit


@pytest.mark.parametrize(
    ("head_dim", "dtype", "limit"),
    [
        (64, jnp.bfloat16, ""),
        (128, jnp.float32, ""),
        (96, jnp.bfloat16, "takes head sizes 64 and 128, not 96"),
        (64, jnp.float16, "takes bfloat16 and float32, not float16"),
    ],
)
def test_limits(head_dim, dtype, limit):
    assert mosaic_tpu.limit(jax.ShapeDtypeStruct((1, 8, 3, head_dim), dtype)) == limit


@pytest.mark.parametrize("seq", [1, 128, 129, 400, 16_384])
def test_default_blocks_are_whole_and_no_longer_than_the_row_needs(seq):
    for size in mosaic_tpu.default_blocks((1, seq, 3, 64), jnp.bfloat16).__dict__.values():
        assert size == min(512, -(-seq // 128) * 128)


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_scale_that_is_not_positive(scale):
    qkv, d_out = kernels.draw_arguments(0, (1, 70, 1, 128), "float32")

    def attention(qkv, scale, segment_ids):
        return flash_attention(qkv, scale, backend="mosaic_tpu", interpret=True)

    def expected(qkv, scale, segment_ids):
        return reference.attention(qkv, scale)

    results, exact = (kernels.attention_and_gradients(f, qkv, scale, None, d_out) for f in (attention, expected))
    for x, y in zip(results[:2], exact[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
