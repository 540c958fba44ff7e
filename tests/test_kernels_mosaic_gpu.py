import dataclasses

import jax
import jax.numpy as jnp
import kernels
import numpy as np
import pytest

from biomedlm_jax.devices import Device
from biomedlm_jax.kernels import mosaic_gpu

BLOCKS = {64: mosaic_gpu.default_blocks((1, 1, 3, 64), "bfloat16"), 128: mosaic_gpu.Blocks()}


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    """An interpreter that failed in one test would fail in all that follow."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()


# A shape takes half a minute: CI's longer part runs all.
@pytest.mark.parametrize(
    "index, shape",
    [
        pytest.param(index, shape, marks=pytest.mark.slow if index > 1 else ())
        for index, shape in enumerate(kernels.draw_shapes(seed=11, n=8))
    ],
)
def test_equals_reference(index, shape):
    """Each kind of length, in turn with documents, and with the usual scale or the smallest."""
    dtype = ("bfloat16", "float16")[index // 2 % 2]
    segment_ids = kernels.draw_segment_ids(index, *shape[:2]) if (index + index // 4) % 2 else None
    scale = kernels.SMALLEST_SCALE if index // 3 % 2 else shape[3] ** -0.5
    kernels.check("mosaic_gpu", shape, dtype, scale, segment_ids, blocks=BLOCKS[shape[3]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"forward_ping_pong": 0, "forward_stages": 3, "dq_keys": 128, "dkv_queries": 128},
        {"dq_stages": 3, "dkv_stages": 2, "dq_keys": 64, "dkv_queries": 64},
    ],
)
def test_other_blocks(changes):
    """Rings deeper and shallower than a tile's steps, and three tiles, one of which has no pair."""
    blocks = dataclasses.replace(BLOCKS[64], **changes)
    kernels.check("mosaic_gpu", (1, 384, 1, 64), "bfloat16", 0.1, kernels.draw_segment_ids(2, 1, 384), blocks=blocks)


def test_no_race(capfd, monkeypatch):
    """The order that barriers make, in vector clocks, with two blocks of threads."""
    params = getattr(mosaic_gpu.plgpu, "InterpretGPUParams", None)
    if params is None:
        pytest.skip("the GPU interpreter of this JAX does not look for races")
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    monkeypatch.setattr(mosaic_gpu, "_multiprocessors", lambda interpret: 2)
    segment_ids = kernels.draw_segment_ids(4, 1, 300)
    blocks = BLOCKS[64]
    kernels.check("mosaic_gpu", (1, 300, 2, 64), "bfloat16", 0.1, segment_ids, params(detect_races=True), blocks)
    assert not interpret_pallas_call.get_races().races_found
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.slow
def test_zero_scale_gives_the_mean_and_a_negative_one_nan():
    qkv, d_out = kernels.draw_arguments(0, (1, 70, 1, 64), "bfloat16")

    def attention(qkv, scale, segment_ids):
        return kernels.flash_attention(qkv, scale, backend="mosaic_gpu", interpret=True)

    out, _, _ = kernels.attention_and_gradients(attention, qkv, 0.0, None, d_out)
    v = qkv[:, :, 2:].astype(jnp.float32)
    mean = jnp.cumsum(v, axis=1) / jnp.arange(1, 71)[:, None, None]
    np.testing.assert_allclose(out.astype(jnp.float32), mean, atol=2e-2)
    out, _, _ = kernels.attention_and_gradients(attention, qkv, -1.0, None, d_out)
    assert jnp.isnan(out).all()


@pytest.mark.slow
def test_same_in_every_run():
    qkv, d_out = kernels.draw_arguments(0, (1, 136, 1, 64), "bfloat16")

    def attention(qkv, scale, segment_ids):
        return kernels.flash_attention(qkv, scale, backend="mosaic_gpu", interpret=True)

    first, second = (kernels.attention_and_gradients(attention, qkv, 0.1, None, d_out)[1] for _ in range(2))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def test_limits():
    def limit(head_dim, dtype):
        return mosaic_gpu.limit(jax.ShapeDtypeStruct((1, 8, 6, head_dim), dtype))

    assert limit(64, jnp.bfloat16) == limit(128, jnp.float16) == ""
    assert limit(96, jnp.bfloat16) == "takes head sizes 64 and 128, not 96"
    assert limit(64, jnp.float32) == "takes bfloat16 and float16, not float32"
    assert mosaic_gpu.device_limit(Device("gpu", "NVIDIA H200", 9.0, 132)) == ""
    assert "this is NVIDIA A100" in mosaic_gpu.device_limit(Device("gpu", "NVIDIA A100", 8.0, 108))
    assert "this is NVIDIA B200" in mosaic_gpu.device_limit(Device("gpu", "NVIDIA B200", 10.0, 148))
