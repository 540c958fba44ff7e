"""The kernels, alone and in the 2.7B model's step, go through the real compilers of GPUs and TPUs that are not here."""

import functools
import re
from collections import Counter
from pathlib import Path

import absent_hardware
import jax
import jax.numpy as jnp
import pytest
import tiny

from biomedlm_jax import compiler_options, hlo, sharding, step, targets
from biomedlm_jax import config as config_lib
from biomedlm_jax import model as model_lib
from biomedlm_jax.config import MeshConfig
from biomedlm_jax.planning import compiled as compiled_lib
from biomedlm_jax.planning import report, traffic

CONFIG_FILE = Path(__file__).parents[1] / "configs" / "biomedlm_2_7b.yaml"


@pytest.fixture(autouse=True)
def compiled_in_full():
    """What was compiled before, or in haste, must not stand in for the compiler."""
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_disable_most_optimizations", True)


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


def lower_the_step_of_the_published_model(name, sequences=8, model=None, train=None, mesh=None):
    """The training step with so many sequences a device, for a target such as a100-40gb:16x8."""
    target = targets.parse(name)
    config = tiny.replace(
        config_lib.load_config(CONFIG_FILE),
        model={"attention": "flash"} | (model or {}),
        train={"global_batch_size": sequences * target.size, "gradient_accumulation_steps": 1} | (train or {}),
        mesh=mesh or {},
    )
    mesh = sharding.make_mesh(config.mesh, target.devices())
    state = jax.eval_shape(functools.partial(step.init_state, config))
    shape = (config.train.global_batch_size, config.model.n_positions)
    batch = step.Batch(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
    jitted = step.jit_train_step(config, sharding.tree_shardings(mesh, state), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return jitted.lower(state, batch)


def products_of(module):
    """What cuBLAS multiplies, as its custom call says it, and how often; those in FP8, and the others."""
    calls = [
        (instruction.attributes, executions)
        for _, instruction, executions in module
        if instruction.opcode == "custom-call" and 'target="__cublas$' in instruction.attributes
    ]
    in_fp8 = [call for call in calls if '"__cublas$lt$matmul$f8"' in call[0]]
    return in_fp8, [call for call in calls if call not in in_fp8]


def text_of(compiled, lowered, target):
    """The optimized program; where XLA cannot print one that it has compiled for TPUs, what went in is looked at."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        assert target in absent_hardware.TPUS and "async-update" in str(error)
        assert "tpu_custom_call" in lowered.as_text()
        pytest.skip(f"this XLA cannot print its program for {target}")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("h200", "h200:1x1"),
        ("a100-40gb", "a100-40gb:1x8"),
        ("v5p", "tpu-v5p:4x4x4"),  # fewer chips take its compiler minutes
    ],
)
def test_the_step_of_the_published_model_compiles_with_the_kernels_in_it(target, name):
    require(target)
    lowered = lower_the_step_of_the_published_model(name)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    print(
        f"{target}: {memory.argument_size_in_bytes / 1e9:.1f} GB of state and batch a device, "
        f"{memory.temp_size_in_bytes / 1e9:.1f} GB of temporaries"
    )
    text = text_of(compiled, lowered, target)
    alone = kernel_calls(absent_hardware.compile_attention(target, 128).as_text())
    # Each kernel runs once a layer: what remat: matmuls recomputes is not the forward kernel.
    runs = sum(
        executions
        for _, instruction, executions in hlo.parse(text)
        if instruction.opcode == "custom-call" and kernel_calls(instruction.attributes)
    )
    assert runs == 32 * alone
    # And each product of a layer once, forward, and twice, backward; those of the head for each part of the positions,
    # the logits twice.
    if target != "v5p":
        assert sum(times for _, times in products_of(hlo.parse(text))[1]) == 32 * (4 + 8) + 4 * (2 + 2)
    collectives = hlo.collectives(hlo.parse(text))
    assert collectives or name == "h200:1x1"
    weight = 2560 * 7680
    for collective in collectives:
        assert collective.kind != "all-reduce" or collective.bytes < 1e6
        # The projection, [8, 1024, 60, 128] on each device in whatever shape, stays where it is.
        for shape in collective.operands:
            assert not ({60, 7680} & set(shape.dims) and shape.size > weight), shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name", "reshard_after_forward"),
    [("a100-40gb", "a100-40gb:16x8", True), ("a100-40gb", "a100-40gb:16x8", False), ("v5p", "tpu-v5p:4x4x8", True)],
)
def test_the_published_model_on_a_pod_exchanges_what_fsdp_must_and_hides_it(target, name, reshard_after_forward):
    require(target)
    lowered = lower_the_step_of_the_published_model(name, mesh={"reshard_after_forward": reshard_after_forward})
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    # Eight sequences, and all that 40 GB hold beside them.
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 24e9
    found = hlo.collectives(hlo.parse(text_of(compiled, lowered, target)))

    def sent(**properties):
        chosen = (c for c in found if all(getattr(c, name) == value for name, value in properties.items()))
        return sum(c.wire_bytes * c.executions for c in chosen)

    model = config_lib.load_config(CONFIG_FILE).model
    embeddings = (model.vocab_size + model.n_positions) * model.n_embd
    weights = model_lib.param_count(model)
    share = 127 / 128
    # In bfloat16: all weights for the forward pass, those of the layers once more for the backward pass.
    gathered = 2 * (weights + (weights - embeddings) * reshard_after_forward) * share
    # Gradients of layers in bfloat16, of embeddings, sums over many tokens, in float32.
    scattered = (2 * (weights - embeddings) + 4 * embeddings) * share
    print(
        f"{name}: gathered {sent(kind='all-gather') / 1e9:.2f} GB of {gathered / 1e9:.2f}, "
        f"scattered {sent(kind='reduce-scatter') / 1e9:.2f} GB of {scattered / 1e9:.2f}"
    )
    assert sent(kind="all-gather") == pytest.approx(gathered, rel=0.05)
    assert sent(kind="reduce-scatter") == pytest.approx(scattered, rel=0.05)
    assert max(c.bytes for c in found if c.kind == "all-reduce") < 1e6
    # What pads shards to the tiles of a TPU.
    others = sum(c.wire_bytes * c.executions for c in found if c.kind in ("all-to-all", "collective-permute"))
    assert others < 0.03 * gathered
    # Apart, with something to compute between.
    for kind in ("all-gather", "reduce-scatter"):
        assert sent(kind=kind, asynchronous=True) > 0.9 * sent(kind=kind), kind

    if target == "a100-40gb":
        for kind in ("all-gather", "reduce-scatter"):
            assert share_under_products(hlo.parse(compiled.as_text()), kind) > 0.85, kind


def share_under_products(module, kind):
    """Of the bytes that a GPU exchanges, those with a matrix product or a kernel between their start and their end."""
    under = total = 0
    for computation, start, executions in module:
        if not start.opcode.startswith(kind) or start.opcode.endswith("-done"):
            continue
        size = executions * sum(shape.bytes for shape in start.shapes)
        total += size
        meanwhile = computation.instructions[computation.instructions.index(start) + 1 :]
        ends = next(i for i, later in enumerate(meanwhile) if start.name in later.operands)
        products = (
            later.opcode == "custom-call" or (later.opcode == "fusion" and "gemm" in later.name)
            for later in meanwhile[:ends]
        )
        under += size * any(products)
    return under / total


# What of 100 MB and more is float32 in a step of 24 sequences, besides parameters, moments and their sums.
FLOAT32 = {
    (24_576, 28_896): "logits, whose softmax needs the range",
    (28_896, 2560): "the embedding's gradient, of the lookup and of the head",
    (24, 1024, 2560): "the embeddings' gradient, which is added up in float32",
}


@functools.cache
def the_published_step_on_one_h200(fp8=False):
    """24 sequences and nothing recomputed, as benchmarks/train_step.py runs it; the peak of memory, and the program."""
    require("h200")
    compiled = lower_the_step_of_the_published_model(
        "h200:1x1",
        sequences=24,
        model={"remat": "none", "unroll": 32, "fp8": fp8},
        train={"loss_chunk": 0},
        mesh={"reshard_after_forward": False},
    ).compile()
    return compiled.memory_analysis().peak_memory_in_bytes, hlo.parse(compiled.as_text())


def test_the_published_model_fits_one_h200_without_recomputation():
    """What is kept of a block is what its products read, in bfloat16."""
    peak, module = the_published_step_on_one_h200()
    print(f"h200, 24 sequences, nothing recomputed: {peak / 1e9:.1f} GB")
    assert peak < 130e9
    arrays = Counter(
        shape.dims
        for instruction in module.computations[module.entry].instructions
        if instruction.opcode not in ("parameter", "tuple", "get-tuple-element", "bitcast")
        for shape in hlo.shapes(instruction.type)
        if shape.dtype == "f32" and shape.bytes > 100e6
    )
    # New parameters and moments.
    stacked = dict.fromkeys(((32, *dims) for dims in ((2560, 7680), (2560, 2560), (2560, 10240), (10240, 2560))), 3)
    unknown = {dims: count for dims, count in arrays.items() if dims not in FLOAT32 and count > stacked.get(dims, 0)}
    assert not unknown
    # Of the embeddings' only: a residual stream in float32 would be there for each layer.
    assert arrays[24, 1024, 2560] <= 3


@pytest.mark.parametrize(("target", "parts"), [("h100:1x1", 128), ("h200:1x1", 64)])
def test_the_configuration_for_one_gpu_fits(target, parts):
    require("h200")
    config = config_lib.load_config(CONFIG_FILE.with_name("biomedlm_2_7b_one_gpu.yaml"))
    config = tiny.replace(config, train={"gradient_accumulation_steps": parts})
    plan = report.make_plan(compiled_lib.compile_step(config, targets.parse(target)))
    print(f"{target}, {parts} parts: {plan.compiled.memory_bytes / 1e9:.1f} GB")
    assert plan.fits
    # Two normalized streams, the stream twice, queries, keys, values and what is made of them, GELU's input and output.
    tokens = config.train.global_batch_size // parts * config.model.n_positions
    kept = 16 * 2 * tokens * config.model.n_embd * config.model.n_layer
    # Logits once, and two gradients.
    head = 2 * tokens * config.model.n_embd * config.model.vocab_size
    assert sum(product.executions for product in plan.compiled.products if product.flops == head) == 3 * parts
    assert plan.compiled.memory["saved activations"] == pytest.approx(kept, rel=0.02)
    assert plan.compiled.memory["gaps, batch, code"] < 0.02 * plan.compiled.memory_bytes


def bytes_moved(module):
    """What a step streams through memory beside products and attention."""
    return sum(access.bytes * access.executions for access in traffic.accesses(module))


def least_traffic(model, tokens):
    """Bytes that a step moves at least, beside products and attention, if biases are added by products.

    Each operation reads what it is made of once and writes what it makes once, the stream and gradients of weights in
    bfloat16, parameters, moments, logits and the embeddings' gradient in float32: a table in docs/performance.md.
    """
    stream = 2 * tokens * model.n_embd
    weights, embedding = model_lib.param_count(model), model.vocab_size * model.n_embd
    logits = tokens * model.vocab_size
    return {
        "the residual stream's sums, and LayerNorm": 2 * model.n_layer * 4 * stream,
        "GELU": model.n_layer * 8 * stream,
        "gradients of LayerNorm and of the sums": 2 * model.n_layer * 4 * stream,
        "the gradient of GELU": model.n_layer * 12 * stream,
        "the gradient of the bias of queries, keys and values": model.n_layer * 3 * stream,
        "weights to bfloat16": (4 + 2) * weights,
        "the loss, and the gradient of logits": (4 + 4 + 2) * logits,
        "embeddings, the last LayerNorm, and their gradients": 12 * stream + 2 * 4 * embedding,
        "the gradient's norm": 2 * weights + 2 * embedding,
        "AdamW": (3 * 4 + 2 + 3 * 4) * weights + 2 * embedding,
    }


def test_the_published_step_moves_little_more_than_it_must():
    """What is split into several passes, or rounded in a pass of its own, shows in bytes."""
    _, module = the_published_step_on_one_h200()
    ideal = least_traffic(config_lib.load_config(CONFIG_FILE).model, 24 * 1024)
    moved = bytes_moved(module)
    for name, size in ideal.items():
        print(f"at least {size / 1e9:6.1f} GB: {name}")
    least = sum(ideal.values())
    print(f"{moved / 1e9:.0f} GB of at least {least / 1e9:.0f}: {moved / least:.2f} times")
    assert 1 <= moved / least < 1.3
    biased = [
        instruction.name
        for _, instruction, _ in module
        if instruction.opcode == "custom-call" and '"epilogue":"BIAS"' in instruction.attributes
    ]
    assert len(biased) == 4 * 32  # of all layers, added by cuBLAS as it writes the products
    assert sum(times for _, times in products_of(module)[1]) == 12 * 32 + 3  # none twice
    # But not the residual stream, which it would copy first.
    assert {re.search('"beta":([^,]*)', attributes)[1] for attributes, _ in products_of(module)[1]} == {"0"}


@pytest.mark.parametrize(("remat", "unroll"), [("none", 2), ("matmuls", 1)])
def test_every_product_of_a_block_is_one_in_fp8(remat, unroll):
    """Two layers of the published width, 24 sequences."""
    require("h200")
    peaks = {}
    for fp8 in (False, True):
        compiled = lower_the_step_of_the_published_model(
            "h200:1x1",
            sequences=24,
            model={"n_layer": 2, "remat": remat, "unroll": unroll, "fp8": fp8},
            train={"loss_chunk": 0},
            mesh={"reshard_after_forward": False},
        ).compile()
        module = hlo.parse(compiled.as_text())
        in_fp8, others = products_of(module)
        peaks[fp8] = compiled.memory_analysis().peak_memory_in_bytes
        print(f"fp8 {fp8}, remat {remat}: {peaks[fp8] / 1e9:.1f} GB, {bytes_moved(module) / 1e9:.1f} GB moved")
    # Four of each layer and two gradients of each, none twice; three of the head stay in bfloat16.
    assert sum(times for _, times in in_fp8) == 2 * 12 and len(others) == 3
    assert sum('"epilogue":"BIAS"' in attributes for attributes, _ in in_fp8) == 4 * unroll
    # What keeps cuBLASLt from summing in fewer bits.
    assert all('"operand_precision":["HIGHEST","HIGHEST"]' in attributes for attributes, _ in in_fp8)
    # Without recomputation, what products read is kept in FP8.
    assert peaks[True] < (1 if remat == "none" else 1.02) * peaks[False]


@pytest.mark.slow
def test_the_published_step_in_fp8_needs_less_memory():
    (peak, module), (peak_without, without) = (the_published_step_on_one_h200(fp8) for fp8 in (True, False))
    print(f"h200, 24 sequences, nothing recomputed: {peak / 1e9:.1f} GB, {bytes_moved(module) / 1e9:.0f} GB moved")
    print(f"without FP8: {peak_without / 1e9:.1f} GB, {bytes_moved(without) / 1e9:.0f} GB moved")
    assert sum(times for _, times in products_of(module)[0]) == 32 * 12
    assert peak < 0.95 * peak_without


@pytest.mark.slow
def test_replicas_of_a_pod_reduce_shards_only():
    require("a100-40gb")
    lowered = lower_the_step_of_the_published_model("a100-40gb:16x8", mesh={"replica": 16})
    found = hlo.collectives(hlo.parse(lowered.compile().as_text()))
    model = config_lib.load_config(CONFIG_FILE).model
    reduced = [c for c in found if c.kind == "all-reduce" and c.bytes > 1e6]
    shard = 4 * model_lib.param_count(model) / 8
    assert sum(c.bytes * c.executions for c in reduced) == pytest.approx(shard, rel=0.05)
    for collective in found:
        # Weights within a host of eight; shards among the devices in the same place of each host.
        hosts = {device // 8 for device in collective.groups[0]}
        if collective.kind in ("all-gather", "reduce-scatter"):
            assert len(hosts) == 1
        elif collective in reduced:
            assert len(hosts) == len(collective.groups[0]) == 16


@pytest.mark.parametrize(("target", "name"), [("a100-40gb", "a100-40gb:1x8"), ("v5p", "tpu-v5p:2x2x2")])
def test_this_compiler_knows_every_option(target, name, monkeypatch, caplog):
    require(target)
    mesh = sharding.make_mesh(MeshConfig(), targets.parse(name).devices())
    with jax.set_mesh(mesh):  # as `train` asks
        chosen = compiler_options.for_mesh(mesh)
    kind = mesh.devices.flat[0].device_kind
    for option in compiler_options.OPTIONS:
        if re.search(option.devices, kind):
            assert len({spelled for spelled, _ in option.spellings} & set(chosen)) == 1, option
    assert chosen
    # What the user sets wins, and what the compiler does not know is named and left out.
    first = next(iter(chosen))
    monkeypatch.setenv("LIBTPU_INIT_ARGS" if target == "v5p" else "XLA_FLAGS", f"--{first}=false")
    assert set(compiler_options.for_mesh(mesh)) == set(chosen) - {first}
    monkeypatch.undo()
    unknown = compiler_options.Option((("xla_no_such_option", 1),), ".", "does nothing")
    monkeypatch.setattr(compiler_options, "OPTIONS", (*compiler_options.OPTIONS, unknown))
    compiler_options._for_mesh.cache_clear()
    assert compiler_options.for_mesh(mesh) == chosen
    assert "no option xla_no_such_option; left out" in caplog.text
    compiler_options._for_mesh.cache_clear()


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
