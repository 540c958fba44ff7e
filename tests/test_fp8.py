"""Products in FP8 beside float64, and the training step with them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from biomedlm_jax import fp8, load, metrics, preparation, sharding, train
from biomedlm_jax import model as model_lib
from biomedlm_jax.config import MeshConfig, ModelConfig
from biomedlm_jax.devices import Device
from biomedlm_jax.errors import UserError

TYPES = [fp8.OPERAND, fp8.GRADIENT]
BFLOAT16 = tiny.replace(model={"compute_dtype": "bfloat16"})
FP8 = tiny.replace(BFLOAT16, model={"fp8": True})


def values_of(dtype):
    """All finite numbers of an FP8 type, ascending, in float64."""
    every = np.arange(256, dtype=np.uint8).view(np.dtype(dtype)).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


def rounded(x, dtype):
    """What FP8 keeps of `x`, float64: the nearest of all its numbers, of two the one with the even last bit, scaled."""
    x, numbers = np.asarray(x, np.float64), values_of(dtype)
    largest = np.abs(x).max()
    scale = 1.0 if largest == 0 else 2.0 ** np.ceil(np.log2(largest / numbers[-1]))
    above = np.clip(np.searchsorted(numbers, x / scale), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    middle, even = (low + high) / 2, low.astype(dtype).view(np.uint8) % 2 == 0
    takes_low = (x / scale < middle) | ((x / scale == middle) & even)
    return np.where(takes_low, low, high) * scale


def random(seed, *shape, spread=1.0):
    """Normal numbers in bfloat16; with a spread, of magnitudes that differ by powers of e."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * np.exp(spread * rng.standard_normal(shape)), jnp.bfloat16)


def quantized(x, dtype):
    """What is left of an array after rounding to FP8, and its scale."""
    scale = fp8.scale_of(x, dtype)
    values = fp8.quantize(x, dtype, scale, x.dtype)
    assert values.dtype == dtype and scale.dtype == jnp.float32
    return np.asarray(values, np.float64) * float(scale), float(scale)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_each_element_is_rounded_to_the_nearest_number(dtype, size):
    x = random(0, 64, 65, spread=3) * jnp.bfloat16(size)
    found, scale = quantized(x, dtype)
    np.testing.assert_array_equal(found, rounded(x, dtype))
    assert np.log2(scale) % 1 == 0
    # No more than half of the range is left unused.
    largest = float(jnp.abs(x).max()) / scale
    assert float(jnp.finfo(dtype).max) / 2 < largest <= float(jnp.finfo(dtype).max)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("power", [-40, 0, 40])
def test_the_largest_number_of_the_type_is_the_largest_that_a_scale_takes(dtype, power):
    largest = float(jnp.finfo(dtype).max) * 2.0**power
    above = float(jnp.nextafter(jnp.float32(largest), jnp.float32(jnp.inf)))
    assert float(fp8.scale_of(jnp.float32([largest]), dtype)) == 2.0**power
    assert float(fp8.scale_of(jnp.float32([-above]), dtype)) == 2.0 ** (power + 1)


@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_and_numbers_too_small_for_a_scale_stay_finite(dtype):
    found, scale = quantized(jnp.zeros((3, 4), jnp.bfloat16), dtype)
    assert not found.any() and scale == 1
    found, _ = quantized(jnp.full((3, 4), 1e-37, jnp.bfloat16), dtype)
    assert (np.abs(found) <= 2e-37).all()


def test_an_outlier_costs_only_the_smallest_numbers_their_bits():
    x = random(1, 1000, spread=0)
    (plain, _), (beside, scale) = (quantized(y, fp8.OPERAND) for y in (x, jnp.append(x, jnp.bfloat16(1e5))))
    # Below 2^-6 of the scale numbers are as far apart as at it.
    small = np.abs(np.asarray(x, np.float64)) < 2.0**-6 * scale
    np.testing.assert_array_equal(plain[~small], beside[:-1][~small])
    assert small.any() and not np.array_equal(plain[small], beside[:-1][small])


def product_and_gradients(x, kernel, d_out):
    out, vjp = jax.vjp(fp8.product, x, kernel)
    return out, *vjp(d_out)


@pytest.mark.parametrize("outlier", [1, 300, 30_000])
@pytest.mark.parametrize("batch", [(40,), (5, 8)])
def test_product_and_gradients_are_those_of_the_rounded_arrays(batch, outlier):
    x, kernel = random(2, *batch, 96), random(3, 96, 72) * jnp.bfloat16(0.02)
    x = x.at[(0,) * x.ndim].multiply(outlier)
    d_out = random(4, *batch, 72, spread=2) * jnp.bfloat16(1e-5)
    found = jax.jit(product_and_gradients)(x, kernel, d_out)
    assert [y.dtype for y in found] == [jnp.bfloat16] * 3
    assert [y.shape for y in found] == [d_out.shape, x.shape, kernel.shape]
    x, kernel, d_out = rounded(x, fp8.OPERAND), rounded(kernel, fp8.OPERAND), rounded(d_out, fp8.GRADIENT)

    def exact(x, kernel, d_out):
        return x @ kernel, d_out @ kernel.T, x.reshape(-1, 96).T @ d_out.reshape(-1, 72)

    for y, true, sum_of_sizes in zip(found, exact(x, kernel, d_out), exact(*map(abs, (x, kernel, d_out))), strict=True):
        # One rounding to bfloat16, and those of sums in float32.
        error = np.abs(np.asarray(y, np.float64) - true)
        assert (error <= 2.0**-8 * np.abs(true) + 1e-6 * sum_of_sizes).all()


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_shows(which, value):
    arrays = [random(5, 4, 8, 16), random(6, 16, 24), random(7, 4, 8, 24)]
    arrays[which] = arrays[which].at[(1,) * arrays[which].ndim].set(value)
    finite = [bool(jnp.isfinite(y).all()) for y in product_and_gradients(*arrays)]
    # Of the product and the gradients of x and of the kernel, those that are made of this array.
    assert not any(made for made, others in zip(finite, (2, 0, 1), strict=True) if others != which)


def test_zeros_give_zeros():
    x, kernel = jnp.zeros((2, 4, 8), jnp.bfloat16), random(8, 8, 16)
    assert not any(y.any() for y in product_and_gradients(x, kernel, jnp.zeros((2, 4, 16), jnp.bfloat16)))


@pytest.mark.parametrize("remat", ["none", "matmuls", "full"])
def test_what_is_saved_for_the_backward_pass_is_not_rounded_again(remat):
    """jax.checkpoint would make nan of what it saves in float8_e4m3fn above 240."""
    x, kernel, d_out = random(9, 4, 8, 16), random(10, 16, 24), random(11, 4, 8, 24)
    x = x.at[0, 0].set(448)

    @jax.jit
    def checkpointed(x, kernel, d_out):
        block = jax.checkpoint(lambda x, kernel: fp8.product(x, kernel), policy=model_lib.REMAT_POLICIES[remat])
        out, vjp = jax.vjp(block, x, kernel)
        return out, *vjp(d_out)

    for found, expected in zip(checkpointed(x, kernel, d_out), product_and_gradients(x, kernel, d_out), strict=True):
        assert np.isfinite(np.asarray(found, np.float64)).all()
        np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-7)


def losses_of(config, mesh=None):
    trainer = tiny.Trainer(config, mesh or MeshConfig(fsdp=1))
    return np.array([trainer(tiny.random_batch(config, index % 2))["train/loss"] for index in range(5)]), trainer


@pytest.fixture(scope="module")
def on_one_device():
    return losses_of(FP8)


def test_the_step_learns_as_in_bfloat16_and_keeps_every_type(on_one_device):
    losses, trainer = on_one_device
    expected, without = losses_of(BFLOAT16)
    np.testing.assert_allclose(losses, expected, atol=0.02)
    assert not np.array_equal(losses, expected) and losses[-1] < losses[0] - 0.2
    types, types_without = (jax.tree.map(lambda x: (x.shape, x.dtype), t.state) for t in (trainer, without))
    assert types == types_without


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        ({}, MeshConfig(fsdp=8)),
        ({"model": {"remat": "matmuls"}}, MeshConfig(replica=2, fsdp=4, reshard_after_forward=False)),
        ({"model": {"remat": "full", "unroll": 2}}, MeshConfig(fsdp=1)),
        ({"train": {"gradient_accumulation_steps": 2}}, MeshConfig(fsdp=1)),
    ],
)
def test_meshes_recomputation_and_accumulation_change_losses_by_rounding_only(changes, mesh, on_one_device):
    losses, _ = losses_of(tiny.replace(FP8, **changes), mesh)
    np.testing.assert_allclose(losses, on_one_device[0], atol=5e-3)


def test_a_run_goes_on_without_it_and_its_model_is_used_without_it(tmp_path):
    def config(fp8, name="run"):
        return tiny.run_config(
            tmp_path / "prepared",
            tmp_path / name,
            model={"compute_dtype": "bfloat16", "fp8": fp8},
            train={"steps": 4, "checkpoint_every": 2, "keep_last": 2, "eval_every": 2},
        )

    def numbers(name, run="run"):
        return {line["step"]: line[name] for line in metrics.read_metrics(tmp_path / run) if name in line}

    preparation.ensure_prepared(config(True))
    assert train.train(config(True)) == 0
    with_fp8, evaluated = numbers("train/loss"), numbers("eval/loss")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert train.train(config(False)) == 0
    without = numbers("train/loss")
    assert with_fp8[2] == without[2] and with_fp8[4] != without[4]
    assert with_fp8[4] == pytest.approx(without[4], abs=0.01)
    # Held-out text is not read in FP8, as it would not be by the model that is exported.
    assert train.train(config(False, "other")) == 0
    assert evaluated[0] == numbers("eval/loss", "other")[0]
    model = load.load_model(tmp_path / "run", compute_dtype="float32")
    assert not model.config.fp8
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    assert np.isfinite(model([[1, 2, 3]])).all()


def test_float32_is_refused():
    with pytest.raises(UserError, match=r"model.fp8 needs model.compute_dtype: bfloat16, not float32"):
        ModelConfig(fp8=True, compute_dtype="float32")


@pytest.mark.parametrize(
    ("device", "serves"),
    [
        (Device("gpu", "NVIDIA A100-SXM4-40GB", 8.0, 108), False),
        (Device("gpu", "NVIDIA L40S", 8.9, 142), False),
        (Device("tpu", "TPU v5", 0.0, 1), False),
        (Device("tpu", "TPU v6 lite", 0.0, 1), False),
        (Device("gpu", "NVIDIA H200", 9.0, 132), True),
        (Device("gpu", "NVIDIA B200", 10.0, 148), True),
        (Device("cpu", "cpu", 0.0, 0), True),
    ],
)
def test_devices_without_it_are_refused_by_name(device, serves, monkeypatch):
    monkeypatch.setattr(fp8, "current_device", lambda: device)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    fp8.check_devices(ModelConfig(), mesh)
    if serves:
        fp8.check_devices(ModelConfig(fp8=True), mesh)
        return
    with pytest.raises(
        UserError, match=f"needs an NVIDIA GPU of generation Hopper or later, and this is a {device.kind}"
    ):
        fp8.check_devices(ModelConfig(fp8=True), mesh)
