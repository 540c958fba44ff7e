"""The kernels, alone and in the 2.7B model's step, go through the real compilers of GPUs and TPUs that are not here."""

import functools
import re
from pathlib import Path

import absent_hardware
import jax
import jax.numpy as jnp
import pytest
import tiny

from biomedlm_jax import config as config_lib
from biomedlm_jax import sharding, step

CONFIG_FILE = Path(__file__).parents[1] / "configs" / "biomedlm_2_7b.yaml"


@pytest.fixture(autouse=True)
def no_compilation_cache():
    """What was compiled before must not stand in for the compiler."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def require(target):
    reason = absent_hardware.missing(target)
    if reason:
        pytest.skip(f"compiling for {target} {reason}")


def kernel_calls(text):
    return len(re.findall(absent_hardware.KERNEL_CALLS, text))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", absent_hardware.TARGETS)
def test_attention_compiles_for_every_device(target, head_dim, packed):
    require(target)
    compiled = absent_hardware.compile_attention(target, head_dim, packed=packed)
    assert kernel_calls(compiled.as_text()) >= 2


@pytest.mark.parametrize(
    ("target", "dtype", "seq", "backend"),
    [
        *(("h200", dtype, 1000, "triton") for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)),
        ("a100-40gb", jnp.float16, 1000, None),
        ("a100-40gb", jnp.float32, 1000, None),
        ("h200", jnp.float16, 1000, "mosaic_gpu"),
        *((target, jnp.bfloat16, seq, None) for target in ("a100-40gb", "h200", "v5e") for seq in (9, 1001)),
        ("v5e", jnp.float32, 1000, None),
        *((target, jnp.bfloat16, seq, None) for target in ("a100-40gb", "h200", "v5e") for seq in (1, 16_384)),
    ],
)
def test_attention_compiles_for_every_type_and_length(target, dtype, seq, backend):
    require(target)
    compiled = absent_hardware.compile_attention(target, 128, dtype, seq=seq, backend=backend)
    assert kernel_calls(compiled.as_text()) >= 2
    # Linear in the length: scores of [16384, 16384] would be forty times as large as the projection.
    memory = compiled.memory_analysis()
    assert seq < 16_384 or memory.temp_size_in_bytes < 8 * memory.argument_size_in_bytes


def lower_the_step_of_the_published_model(target, count):
    """The training step with eight sequences a device."""
    config = tiny.replace(
        config_lib.load_config(CONFIG_FILE),
        model={"attention": "flash", "remat": "matmuls"},
        train={"global_batch_size": 8 * count},
    )
    mesh = absent_hardware.make_mesh(target, count)
    state = jax.eval_shape(functools.partial(step.init_state, config))
    shape = (config.train.global_batch_size, config.model.n_positions)
    batch = step.Batch(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
    jitted = step.jit_train_step(config, sharding.tree_shardings(mesh, state), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return jitted.lower(state, batch)


@pytest.mark.parametrize(("target", "count"), [("a100-40gb", 8), ("h200", 1), ("v5p", 8)])
def test_the_step_of_the_published_model_compiles_with_the_kernels_in_it(target, count):
    require(target)
    lowered = lower_the_step_of_the_published_model(target, count)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    print(
        f"{target}: {memory.argument_size_in_bytes / 1e9:.1f} GB of state and batch a device, "
        f"{memory.temp_size_in_bytes / 1e9:.1f} GB of temporaries"
    )
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        # XLA cannot print some programs that it has compiled for TPUs; what went in can be looked at, at least.
        assert target in absent_hardware.TPUS and "async-update" in str(error)
        assert "tpu_custom_call" in lowered.as_text()
        return
    alone = kernel_calls(absent_hardware.compile_attention(target, 128).as_text())
    # Layers are scanned, so each kernel is there once: what remat: matmuls recomputes is not the forward kernel.
    assert kernel_calls(text) == alone
    # The projection, [8, 1024, 60, 128] on each device in whatever shape, stays where it is.
    collectives = re.findall(
        r"= \(?\w+\[([\d,]*)\]\S* .*?(?:all-gather|all-reduce|all-to-all|permute)(?:-start)?\(", text
    )
    sizes = [[int(size) for size in dims.split(",") if size] for dims in collectives]
    assert count == 1 or sizes
    weight = 2560 * 7680
    for shape in sizes:
        elements = functools.reduce(lambda a, b: a * b, shape, 1)
        assert not ({60, 7680} & set(shape) and elements > weight), shape


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("target", "backend", "product"), [("h200", "mosaic_gpu", "HGMMA"), ("a100-40gb", "triton", "HMMA")]
)
def test_machine_code_uses_tensor_cores_and_spills_nothing(target, backend, product, head_dim, packed):
    require(target)
    codes = absent_hardware.machine_code(target, head_dim, backend, packed)
    assert len({code.name for code in codes}) >= 3
    for code in codes:
        print(code.name, f"{code.registers} registers, {code.shared:,} bytes of shared memory")
    for code in codes:
        assert code.instructions[product] > 0 and code.shared > 0
        assert not {"LDL", "STL"} & set(code.instructions) and code.spills == 0, code.name


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_softmax_on_hopper_runs_beside_a_product(head_dim):
    """In the loop: two products of 128 x 128 are issued, one awaited, 64 exponentials taken, the other one awaited."""
    require("h200")
    forward = absent_hardware.machine_code("h200", head_dim, "mosaic_gpu")[0]
    marks = {"HGMMA": "P", "WARPGROUP": "w", "MUFU": "e"}
    # WARPGROUP.ARRIVE comes before products, WARPGROUP.DEPBAR after them.
    order = "".join(marks.get(opcode, "") for opcode in forward.opcodes)
    products = (head_dim + 128) // 16
    assert re.search(rf"w+P+w*P{{{products // 2},}}we{{64,}}w", order), order
