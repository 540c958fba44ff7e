"""Which implementation of attention runs, and that the model trains alike with each."""

import dataclasses
import itertools
import logging
import re

import jax
import jax.extend.core as jax_core
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from biomedlm_jax import attention, sharding, step
from biomedlm_jax import model as model_lib
from biomedlm_jax.attention import causal_attention
from biomedlm_jax.config import MeshConfig, ModelConfig
from biomedlm_jax.devices import Device
from biomedlm_jax.errors import UserError
from biomedlm_jax.kernels.documents import documents
from biomedlm_jax.kernels.flash_attention import choose_backend, flash_attention
from biomedlm_jax.kernels.reference import attention as exact_attention

DEVICES = {
    "cpu": Device("cpu", "cpu", 0.0, 1),
    "v100": Device("gpu", "NVIDIA V100-SXM2-16GB", 7.0, 80),
    "a100": Device("gpu", "NVIDIA A100-SXM4-40GB", 8.0, 108),
    "h200": Device("gpu", "NVIDIA H200", 9.0, 132),
    "v5p": Device("tpu", "TPU v5", 0.0, 2),
}

# Two heads of 64, rows off the grid of blocks.
FLASH = tiny.replace(
    # With weights as small as GPT-2's, a model of this size attends to all alike, whatever the scale of its scores.
    model={"n_positions": 100, "n_embd": 128, "n_head": 2, "initializer_range": 0.05},
    # At higher rates the run in bfloat16 is chaotic: any change of rounding moves its losses by percents.
    optimizer={"learning_rate": 1e-3, "warmup_steps": 5},
    train={"global_batch_size": 8},
)


def random_qkv(shape=(2, 20, 6, 64), dtype=jnp.bfloat16, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def shape_of(dtype=jnp.bfloat16, shape=(2, 20, 6, 64)):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture
def on_device(monkeypatch):
    """Lets the choice believe in another device; nothing may be computed then."""

    def patch(name):
        monkeypatch.setattr(attention, "current_device", lambda: DEVICES[name])

    return patch


@pytest.fixture
def said(caplog):
    """What the package logs, as if it had said nothing before."""
    attention._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="biomedlm_jax")
    return caplog


# ---- The choice


@pytest.mark.parametrize(
    ("device", "changes", "extras", "choice", "reason"),
    [
        ("cpu", {}, [], "reference", "runs on NVIDIA GPUs from Ampere .* and on TPUs .* this is cpu; cudnn runs on"),
        ("v100", {}, [], "reference", "this is NVIDIA V100.*; cudnn runs on NVIDIA Ampere and later"),
        ("a100", {}, [], "flash", ""),
        ("h200", {}, [], "flash", ""),
        ("v5p", {}, [], "flash", ""),
        # Where ours stops and cuDNN goes on, and where both stop.
        ("h200", {"shape": (2, 20, 6, 80)}, [], "cudnn", "kernel takes .* not 80"),
        ("h200", {"shape": (1, 20_000, 6, 64)}, [], "cudnn", "up to 16384 positions a row, not 20000"),
        ("a100", {"shape": (2, 20, 6, 20)}, [], "reference", "not 20; cudnn takes head sizes .*, not 20"),
        ("v5p", {"shape": (2, 20, 6, 80)}, [], "reference", "kernel takes .* not 80; cudnn runs on NVIDIA GPUs"),
        ("a100", {"dtype": jnp.int32}, [], "reference", "not int32; cudnn takes bfloat16 and float16, not int32"),
        ("h200", {}, ["an attention mask"], "reference", "flash .* not used with an attention mask; cudnn is not used"),
    ],
)
def test_auto_takes_what_serves_and_says_once_why(on_device, said, device, changes, extras, choice, reason):
    on_device(device)
    for _ in range(2):
        assert attention._choose(shape_of(**changes), extras, packed=False) == choice
    (message,) = said.messages
    assert message.startswith(f"attention: {choice}") and re.search(reason, message), message
    assert bool(reason) == ("(" in message)


def test_hopper_prefers_its_own_kernel():
    assert choose_backend(shape_of(), DEVICES["h200"]) == "mosaic_gpu"
    assert choose_backend(shape_of(), DEVICES["a100"]) == "triton"
    assert choose_backend(shape_of(), DEVICES["v5p"]) == "mosaic_tpu"
    # float32 is only Triton's.
    assert choose_backend(shape_of(jnp.float32), DEVICES["h200"]) == "triton"


def test_auto_falls_back_for_masks_and_dropout():
    qkv, mask = random_qkv(), jnp.ones((2, 20), bool).at[0, 15:].set(False)
    for extra in ({"mask": mask}, {"dropout_rate": 0.5, "dropout_keys": jax.random.split(jax.random.key(0), 2)}):
        np.testing.assert_array_equal(
            causal_attention(qkv, 0.1, **extra), causal_attention(qkv, 0.1, implementation="reference", **extra)
        )
    # A rate without a key drops nothing, so flash can do it.
    causal_attention(qkv, 0.1, implementation="flash", dropout_rate=0.5)


@pytest.mark.parametrize(
    ("implementation", "device", "arguments", "message"),
    [
        ("flash", "cpu", {"mask": jnp.ones((2, 20), bool)}, "not used with an attention mask; use attention: auto or"),
        (
            "flash",
            "cpu",
            {"dropout_rate": 0.5, "dropout_keys": jax.random.split(jax.random.key(0), 2)},
            r"not used with dropout .*attn_pdrop",
        ),
        (
            "cudnn",
            "cpu",
            {},
            "attention: cudnn runs on NVIDIA GPUs, and this is a cpu; use attention: auto or reference",
        ),
        ("cudnn", "v100", {}, "cudnn runs on NVIDIA Ampere and later, and this is a NVIDIA V100"),
        ("cudnn", "h200", {"segment_ids": jnp.ones((2, 20), int)}, "cudnn is not used with packed documents"),
        ("cudnn", "h200", {"mask": jnp.ones((2, 20), bool)}, "cudnn is not used with an attention mask"),
    ],
)
def test_a_named_implementation_never_gives_way(on_device, implementation, device, arguments, message):
    on_device(device)
    with pytest.raises(UserError, match=message):
        causal_attention(random_qkv(), 0.1, implementation=implementation, **arguments)


def test_flash_on_a_cpu_is_interpreted_and_says_so(said):
    qkv = random_qkv(dtype=jnp.float32)
    for _ in range(2):
        out = causal_attention(qkv, 0.1, implementation="flash")
    np.testing.assert_allclose(out, exact_attention(qkv, 0.1), atol=1e-5)
    assert [(record.levelname, "interpreted" in record.message) for record in said.records] == [("WARNING", True)]


def test_settings_refuse_dropout_that_nobody_does():
    for name in ("flash", "cudnn"):
        with pytest.raises(UserError, match=f"model.attention: {name} has no dropout of .*attn_pdrop: 0.1"):
            ModelConfig(attention=name, attn_pdrop=0.1)
    ModelConfig(attention="auto", attn_pdrop=0.1)


# ---- Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qkv": jnp.ones((2, 20, 6, 80))}, "kernel takes .*64.*128.* not 80"),
        ({"qkv": jnp.ones((2, 20, 6, 64), jnp.int32)}, "kernel takes .*bfloat16.* not int32"),
        ({"qkv": jnp.ones((2, 20, 6, 64), jnp.float8_e4m3fn)}, "kernel takes .*bfloat16.* not float8_e4m3fn"),
        ({"qkv": jnp.ones((2, 20, 7, 64))}, r"qkv must be \[batch, seq, 3 \* heads, head_dim\].* not \[2, 20, 7, 64\]"),
        ({"qkv": jnp.ones((20, 6, 64))}, r"not \[20, 6, 64\]"),
        ({"qkv": jnp.ones((0, 20, 6, 64))}, r"none of them 0, not \[0, 20, 6, 64\]"),
        ({"qkv": jnp.ones((2, 0, 6, 64))}, r"none of them 0"),
        ({"qkv": jnp.ones((2, 20, 0, 64))}, r"none of them 0"),
        ({"qkv": jnp.ones((1, 16_385, 3, 64), jnp.bfloat16)}, "takes up to 16384 positions a row, not 16385"),
        ({"scale": float("nan")}, "scale must be one finite number that is not negative, not nan"),
        ({"scale": np.float32("inf")}, "scale must be one finite number that is not negative, not inf"),
        ({"scale": jnp.ones(1)}, "scale must be one finite number that is not negative, not"),
        ({"scale": 1j}, "scale must be one finite number that is not negative, not 1j"),
        ({"scale": 1e39}, r"scale must be one finite number that is not negative, not 1e\+39"),
        ({"scale": 10**400}, "scale must be one finite number that is not negative, not 1000"),
        ({"scale": -0.1}, "scale must be one finite number that is not negative, not -0.1"),
        ({"scale": None}, "scale must be one finite number that is not negative, not None"),
        ({"scale": True}, "scale must be one finite number that is not negative, not True"),
        ({"segment_ids": jnp.ones((2, 19), int)}, r"integers of shape \[2, 20\], not int32 of shape \[2, 19\]"),
        ({"segment_ids": jnp.ones((2, 20))}, r"integers of shape \[2, 20\], not float32 of shape \[2, 20\]"),
        ({"segment_ids": jnp.ones((2, 20), bool)}, "not bool"),
        ({"segment_ids": jnp.ones(20, int)}, r"of shape \[20\]"),
        ({"backend": "reference"}, "the kernels are mosaic_gpu, triton, mosaic_tpu, not reference"),
        ({"blocks": {"block_q": 64}}, "blocks of the triton kernel are triton.Blocks, not"),
        ({"interpret": False}, "the triton kernel .* this is a? ?cpu"),
        ({"interpret": False, "backend": None}, "flash attention runs on NVIDIA GPUs from Ampere .* this is cpu"),
    ],
)
def test_bad_input_is_named_when_it_is_traced(arguments, message):
    arguments = {"qkv": jnp.ones((2, 20, 6, 64)), "scale": 0.1, "backend": "triton", "interpret": True} | arguments
    traced = {"qkv": arguments.pop("qkv")}
    if isinstance(arguments["scale"], jax.Array):
        traced["scale"] = arguments.pop("scale")
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda traced: flash_attention(**traced, **arguments), traced)


@pytest.mark.parametrize("device", ["v100", "cpu"])
def test_no_kernel_for_a_device_is_named(device):
    with pytest.raises(UserError, match="flash attention runs on NVIDIA GPUs from Ampere"):
        choose_backend(shape_of(), DEVICES[device])
    for backend in ("triton", "mosaic_gpu", "mosaic_tpu"):
        with pytest.raises(UserError, match=f"the {backend} kernel"):
            choose_backend(shape_of(), DEVICES[device], backend)


def test_scale_may_be_any_real_number():
    qkv = random_qkv(dtype=jnp.float32)
    for scale in (1, np.float64(1), jnp.bfloat16(1), jnp.int32(1)):
        out = flash_attention(qkv, scale, backend="triton", interpret=True)
        np.testing.assert_allclose(out, exact_attention(qkv, 1.0), atol=1e-5)


# ---- Documents


@pytest.mark.parametrize("implementation", ["reference", "flash"])
def test_documents_do_not_attend_to_each_other(implementation):
    """A packed row equals its documents, each alone."""
    lengths = (1, 7, 30, 2)
    qkv = random_qkv((2, sum(lengths), 6, 64), jnp.float32)
    # The same id twice, apart, is two documents.
    segment_ids = jnp.broadcast_to(jnp.repeat(jnp.array([3, 1, 3, 0]), jnp.array(lengths)), qkv.shape[:2])

    def packed(qkv):
        return causal_attention(qkv, 0.2, implementation=implementation, segment_ids=segment_ids)

    def alone(qkv):
        pieces = jnp.split(qkv, np.cumsum(lengths)[:-1], axis=1)
        return jnp.concatenate([exact_attention(piece, 0.2) for piece in pieces], axis=1)

    (out, vjp), (expected, expected_vjp) = jax.vjp(jax.jit(packed), qkv), jax.vjp(jax.jit(alone), qkv)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    weight = random_qkv(out.shape, jnp.float32, seed=1)
    np.testing.assert_allclose(vjp(weight)[0], expected_vjp(weight)[0], atol=1e-5)
    assert float(jnp.abs(out - exact_attention(qkv, 0.2)).max()) > 0.1
    assert documents(segment_ids).starts[0].tolist() == [0] + [1] * 7 + [8] * 30 + [38] * 2


# ---- In the model


@pytest.mark.parametrize(
    ("mesh", "compute_dtype"),
    [(MeshConfig(fsdp=1), "float32"), pytest.param(MeshConfig(replica=2, fsdp=4), "bfloat16", marks=pytest.mark.slow)],
)
def test_fifty_steps_with_flash_equal_the_references(mesh, compute_dtype):
    losses = {}
    for name in ("reference", "flash"):
        config = tiny.replace(FLASH, model={"attention": name, "compute_dtype": compute_dtype, "remat": "matmuls"})
        trainer = tiny.Trainer(config, mesh)
        # Fresh tokens of a little language at each step: the successor of a word is one of two.
        losses[name] = [trainer(successors(config, index))["train/loss"] for index in range(config.train.steps)]
    difference = np.abs(np.subtract(losses["flash"], losses["reference"]))
    # Under 1e-3 is the promise; in float32, where rounding is small, a mistake could hide below it.
    assert 0 < difference.max() < (1e-3 if compute_dtype == "bfloat16" else 1e-5)
    assert losses["flash"][-1] < losses["flash"][0] - 1


def successors(config, index):
    """Rows in which the next word is one of two."""
    shape = (config.train.global_batch_size, config.model.n_positions)
    start, steps = jax.random.split(jax.random.key(2000 + index))
    first = jax.random.randint(start, (shape[0], 1), 0, config.model.vocab_size)
    moves = 1 + 6 * jax.random.bernoulli(steps, 0.5, shape)
    return step.Batch((first + jnp.cumsum(moves, axis=1)) % config.model.vocab_size, jnp.ones(shape, bool))


@pytest.mark.parametrize(
    "changes",
    [{"unroll": 2}, {"remat": "matmuls"}, {"remat": "matmuls", "unroll": 2}, {"remat": "full"}, {"remat": "none"}],
)
def test_flash_serves_every_way_to_run_the_blocks(changes):
    batch = tiny.random_batch(FLASH, 0)
    values = []
    for config, mesh in (
        (FLASH, MeshConfig(fsdp=1)),
        (tiny.replace(FLASH, model=changes | {"attention": "flash"}), MeshConfig(fsdp=8)),
    ):
        trainer = tiny.Trainer(config, mesh)
        values.append([trainer(batch) for _ in range(3)][-1])
    assert values[1]["train/loss"] == pytest.approx(values[0]["train/loss"], abs=1e-5)
    assert values[1]["train/grad_norm"] == pytest.approx(values[0]["train/grad_norm"], rel=1e-4)


def count_kernels(jaxpr):
    """Pallas calls in a program whose results are used, those in the body of a loop counted once."""
    variables = itertools.chain(jaxpr.outvars, *(equation.invars for equation in jaxpr.eqns))
    used = {v for v in variables if not isinstance(v, jax_core.Literal)}
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            # Before jax 0.12 dead ones stay until XLA removes them.
            found += any(v in used for v in equation.outvars)
        else:
            found += sum(map(count_kernels, jax_core.jaxprs_in_params(equation.params)))
    return found


def test_recomputing_a_block_runs_the_forward_kernel_again_only_if_nothing_is_saved():
    tokens = jnp.zeros((2, 100), int)
    params = model_lib.init_params(FLASH.model, 0)

    def kernels(remat):
        config = dataclasses.replace(FLASH.model, attention="flash", remat=remat)
        grad = jax.grad(lambda params: model_lib.merge(config, params)(tokens).sum())
        return count_kernels(jax.make_jaxpr(grad)(params).jaxpr)

    counts = {remat: kernels(remat) for remat in ("none", "matmuls", "full")}
    assert counts["matmuls"] == counts["none"] and counts["full"] == counts["none"] + 1


def test_the_step_with_flash_exchanges_what_the_references_exchanges():
    """No rows are gathered for the kernel, and nothing is summed for the gradient of the scale."""
    collectives = {}
    for name in ("reference", "flash"):
        trainer = tiny.Trainer(tiny.replace(FLASH, model={"attention": name}), MeshConfig(fsdp=8))
        with jax.set_mesh(trainer.mesh):
            batch = jax.device_put(tiny.random_batch(FLASH, 0), sharding.batch_sharding(trainer.mesh))
            text = trainer.jitted_step.lower(trainer.state, batch).compile().as_text()
        pattern = r"= (\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
        collectives[name] = sorted((op, re.sub(r"\{.*", "", shape)) for shape, op in re.findall(pattern, text))
    assert collectives["flash"] == collectives["reference"] and collectives["flash"]


@pytest.mark.parametrize("implementation", ["reference", "flash"])
def test_rows_that_do_not_divide_over_the_mesh_are_named(implementation):
    model = model_lib.merge(
        dataclasses.replace(FLASH.model, attention=implementation), model_lib.init_params(FLASH.model, 0)
    )
    with (
        jax.set_mesh(sharding.make_mesh(MeshConfig())),
        pytest.raises(UserError, match="a batch of 3 rows does not divide over the 8 devices"),
    ):
        jax.eval_shape(model, jax.ShapeDtypeStruct((3, 100), jnp.int32))
