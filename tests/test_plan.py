"""Plans: which targets there are, what a compiled step needs, how long it takes, and what a user is told."""

import dataclasses
import json
import re
import subprocess
import sys
import types

import jax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache

from biomedlm_jax import hlo, model, sharding, targets
from biomedlm_jax.config import MeshConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import FinetuneConfig, FinetuneTrainConfig, LoraConfig, TaskConfig
from biomedlm_jax.planning import compiled as compiled_lib
from biomedlm_jax.planning import drawing, flops, memory, report, roofline, search, traffic

A100 = targets.CHIPS["a100-40gb"]
CONFIG_FILE = "configs/biomedlm_2_7b.yaml"


def require(name):
    reason = targets.missing(name)
    if reason:
        pytest.skip(f"compiling for {name} {reason}")


# ---- Targets


@pytest.mark.parametrize(
    ("text", "name", "dims", "size"),
    [
        ("a100-40gb:16x8", "a100-40gb", (16, 8), 128),
        ("h200:1x1", "h200", (1, 1), 1),
        ("tpu-v5p:4x4x8", "tpu-v5p", (4, 4, 8), 128),
        ("tpu-v4:2x2x1", "tpu-v4", (2, 2, 1), 4),
        ("tpu-v6e:16x16", "tpu-v6e", (16, 16), 256),
    ],
)
def test_targets_are_read(text, name, dims, size):
    target = targets.parse(text)
    assert (target.chip.name, target.dims, target.size, str(target)) == (name, dims, size, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100:16x8", "did you mean a100-40gb?"),
        ("h10:1x8", "did you mean h100?"),
        ("gaudi:1x8", "There are a100-40gb, a100-80gb, h100, h200, tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e"),
        ("a100-40gb", "after a100-40gb: comes HOSTSxGPUS, as in 16x8"),
        ("a100-40gb:0x8", "HOSTSxGPUS"),
        ("h100:2x2x2", "HOSTSxGPUS"),
        ("h100:2x16", "a host has at most 8 h100, not 16"),
        ("h100:99999x8", "more than can be planned for"),
        ("tpu-v5p:16x16", "there is no such slice of tpu-v5p"),
        ("tpu-v5p:4x4x5", "there is no such slice of tpu-v5p"),
        ("tpu-v5p:16x32x32", "the largest slice of tpu-v5p has 6,144"),
        ("tpu-v5e:16x32", "there is no such slice of tpu-v5e; there are 1x1, 2x2"),
    ],
)
def test_targets_that_do_not_exist(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        targets.parse(text)
    assert "\n" not in str(raised.value)


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    for name in ("h100:1x8", "tpu-v5e:2x4"):
        with pytest.raises(
            UserError, match=re.escape("needs the wheel") + ".*" + re.escape("pip install -e '.[plan]'")
        ):
            targets.parse(name).devices()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 NVL", "h100"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5", "tpu-v5p"),
    ],
)
def test_chips_are_known_by_what_jax_calls_them(kind, name):
    chip = targets.chip_of(kind)
    assert chip and chip.name == name


def gpus(*hosts):
    return [types.SimpleNamespace(process_index=host) for host in hosts]


def chips(*coords):
    return [types.SimpleNamespace(coords=coord) for coord in coords]


def test_bandwidth_of_a_group():
    pod = targets.parse("a100-40gb:16x8")
    assert pod.bandwidth(gpus(3, 3, 3, 3)) == (300e9, "within hosts")
    # Rings through eight hosts' network cards; through one of each host; NVLink is the limit of sixteen cards.
    assert pod.bandwidth(gpus(*[host for host in range(16) for _ in range(8)])) == (8 * 25e9, "between hosts")
    assert pod.bandwidth(gpus(*range(16))) == (25e9, "between hosts")
    assert targets.parse("a100-40gb:2x16").bandwidth(gpus(*[0] * 16, *[1] * 16)) == (300e9, "between hosts")
    cube = targets.parse("tpu-v5p:4x4x8")
    assert cube.bandwidth(chips(*((0, 0, z) for z in range(8)))) == (2 * 100e9, "ICI")  # a ring, both ways
    assert cube.bandwidth(chips(*((0, 0, z) for z in range(4)))) == (100e9, "ICI")  # half of one
    assert cube.bandwidth(chips((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0))) == (2 * 100e9, "ICI")


# ---- What a step needs


@pytest.fixture(scope="module")
def compiled():
    """A small step on eight CPU devices, four of them to a copy of the model, as if they were GPUs."""
    return compile_here(
        tiny.replace(
            model={"remat": "matmuls"}, mesh={"replica": 2, "fsdp": 4}, train={"gradient_accumulation_steps": 2}
        )
    )


def compile_here(config):
    mesh = sharding.make_mesh(config.mesh)
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # other tests in this process may have used it
    try:
        return compiled_lib.compile_on(config, targets.Target(A100, (1, 8)), mesh)
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def test_memory_by_parts(compiled):
    count = model.param_count(compiled.config.model)
    assert tuple(compiled.memory) == memory.PARTS
    # Split over four devices; each buffer is rounded up a little.
    assert compiled.memory["parameters"] == pytest.approx(4 * count / 4, rel=0.05)
    assert compiled.memory["moments"] == pytest.approx(2 * 4 * count / 4, rel=0.05)
    assert compiled.memory["workspace"] + compiled.memory["saved activations"] > 0
    assert compiled.unknown == ()


@pytest.mark.parametrize("name", ["medqa", "pubmedqa", "generation"])
def test_fine_tuning_is_planned_as_it_is_computed(name):
    """Of LoRA, whose moments are few; weights are as many as ever."""
    config = FinetuneConfig(
        task=TaskConfig(name=name, max_length=64, max_source_length=30, max_target_length=30),
        model=dataclasses.replace(tiny.CONFIG.model, n_positions=64, n_embd=128, attn_pdrop=0.1),
        lora=LoraConfig(rank=4),
        mesh=MeshConfig(2, 4),
        train=FinetuneTrainConfig(global_batch_size=16),
    )
    compiled = compile_here(config)
    count = model.param_count(config.model)
    assert compiled.memory["parameters"] == pytest.approx(4 * count / 4, rel=0.2)
    assert compiled.memory["moments"] < 0.3 * compiled.memory["parameters"]
    plan = report.make_plan(compiled)
    rows = 64 if name == "medqa" else 16
    assert plan.tokens_per_step == rows * 64
    text = report.as_text(plan)
    assert f"a step: {rows} sequences of 64 tokens" in text and "an epoch of 10,000 examples takes" in text


def test_memory_parts_sum_to_what_the_compiler_says():
    """Of values that share their place one counts; what is not there at the peak are gaps."""
    dump = memory.Dump(
        hlo="""\
  %param.0 = f32[8,32]{1,0} parameter(0), metadata={op_name="state.params['h']['kernel']"}
  %param.1 = f32[8,32]{1,0} parameter(1), metadata={op_name="state.opt_state[1].mu['h']['kernel']"}
  %saved = bf16[2,16,32]{2,1,0} fusion(%param.0), metadata={op_name="jit(train_step)/jvp()/while/dynamic_update_slice"}
  %logits = f32[16,61]{1,0} custom-call(%saved), metadata={op_name="jit(train_step)/jvp()/dot_general"}
  %all-gather.1 = bf16[32,32]{1,0} all-gather(%param.0), metadata={op_name="jit(train_step)/jvp()/convert_element_type"}
  %grad = f32[8,32]{1,0} fusion(%saved), metadata={op_name="jit(train_step)/transpose(jvp())/add_any"}
  %normalized = bf16[16,32]{1,0} fusion(%saved), metadata={op_name="jit(train_step)/jvp()/mul"}
  %iota = s32[16]{0} iota(), metadata={op_name="jit(train_step)/transpose(jvp())/iota"}
  %new = f32[8,32]{1,0} fusion(%grad), metadata={op_name="jit(train_step)/add"}
""",
        buffers="""\
BufferAssignment:
allocation 0: size 1024, page 0, parameter 0, shape |f32[8,32]| at ShapeIndex {}, maybe-live-out:
 value: <1 param.0 @0> (size=1024,offset=0): f32[8,32]{1,0}
allocation 1: size 1024, page 0, parameter 1, shape |f32[8,32]| at ShapeIndex {}, maybe-live-out:
 value: <2 param.1 @0> (size=1024,offset=0): f32[8,32]{1,0}
allocation 2: size 10000, page 0, preallocated-temp:
 value: <3 saved @0> (size=2048,offset=0): bf16[2,16,32]{2,1,0}
 value: <4 while.1{2} (phi) @0> (size=2048,offset=0): bf16[2,16,32]{2,1,0}
 value: <5 logits @0> (size=3904,offset=2048): f32[16,61]{1,0}
 value: <6 all-gather.1 @0> (size=2048,offset=5952): bf16[32,32]{1,0}
 value: <7 grad @0> (size=1024,offset=8000): f32[8,32]{1,0}
 value: <9 normalized @0> (size=512,offset=9024): bf16[16,32]{1,0}
 value: <10 iota @0> (size=64,offset=9600): s32[16]{0}
 value: <11 new @0> (size=1024,offset=0): f32[8,32]{1,0}
allocation 3: size 4096, color 1, page 0, preallocated-temp:
 value: <8 in_a_core @1> (size=4096,offset=0): f32[1024]{0}

Total bytes used: 12048 (11.8KiB)
""",
        live_ranges="""\
  InstructionSequence:
    0:param.0
    1:iota
    2:all-gather.1
    3:saved
    4:normalized
    5:logits
    6:grad
    7:new
  BufferLiveRange:
    param.0{}:0-8
    iota{}:1-6
    all-gather.1{}:2-6
    saved{}:3-6
    while.1{2}:3-6
    normalized{}:4-7
    in_a_core{}:4-5
    logits{}:5-6
    grad{}:6-7
    new{}:7-8
""",
    )
    stats = types.SimpleNamespace(
        argument_size_in_bytes=2148,  # with a batch of 100 bytes
        output_size_in_bytes=2060,
        alias_size_in_bytes=2048,
        temp_size_in_bytes=10_000,
        generated_code_size_in_bytes=500,
    )
    assert memory.total_bytes(stats) == 12_660
    config = tiny.replace(train={"global_batch_size": 4})
    found = memory.parts(stats, dump, config, fsdp=4, devices=4)
    gaps = 10_000 - 2048 - 512 - 3904 - 2048 - 1024 - 64
    assert found == {
        "parameters": 1024,
        "moments": 1024,
        "gradients": 1024,
        "saved activations": 2048 + 512,
        "logits": 3904,
        "weights gathered or cast": 2048,
        "workspace": 64,
        "gaps, batch, code": gaps + 100 + 12 + 500,
    }
    assert sum(found.values()) == 12_660
    # Without a dump nothing is known but the sum.
    nothing = memory.parts(stats, memory.Dump("", "", ""), config, fsdp=4, devices=4)
    assert nothing == dict.fromkeys(memory.PARTS, 0) | {"gaps, batch, code": 12_660}


def test_flops_are_those_of_the_products(compiled):
    config = compiled.config.model
    matrices = 12 * config.n_layer * config.n_embd**2
    tokens = compiled.config.train.global_batch_size * config.n_positions / 8
    head = config.vocab_size * config.n_embd
    attention = 2 * config.n_layer * config.n_positions * config.n_embd  # products of the full square
    plan = report.make_plan(compiled)
    # Kept are the matrix products, and only these: the reference attention's own are computed again.
    expected = tokens * (6 * (matrices + head) + (3 + 1) * 2 * attention)
    assert plan.hardware_flops == pytest.approx(8 * expected, rel=0.02)
    by_phase = {
        phase: sum(p.flops * p.executions for p in compiled.products if p.phase == phase) for phase in flops.PHASES
    }
    assert by_phase["forward"] == pytest.approx(tokens * (2 * (matrices + head) + 2 * attention), rel=0.02)
    assert by_phase["optimizer"] == 0
    assert plan.model_flops == 8 * tokens * model.flops_per_token(config)


def test_every_layer_of_every_part_is_exchanged(compiled):
    """Twice two layers' gradients are summed over the copies of the model and over its shards."""
    layer = 12 * compiled.config.model.n_embd**2 * 4
    sent = sum(c.bytes * c.executions for c in compiled.collectives if c.kind in ("all-reduce", "reduce-scatter"))
    assert sent >= 2 * 2 * layer
    links = {exchange.link for exchange in report.make_plan(compiled).exchanges}
    assert links == {"within hosts"}


def test_memory_traffic_counts_what_is_read_and_written():
    text = """\
HloModule m, is_scheduled=true

%body (p0: f32[32,1024], p1: f32[1024], p2: s32[]) -> f32[32,1024] {
  %p0 = f32[32,1024]{1,0} parameter(0)
  %p1 = f32[1024]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %row = f32[1,1024]{1,0} bitcast(%p1)
  ROOT %dus = f32[32,1024]{1,0} dynamic-update-slice(%p0, %row, %p2, %p2)
}

%slices (q0: f32[32,1024], q1: s32[]) -> f32[1,1024] {
  %q0 = f32[32,1024]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %slice = f32[1,1024]{1,0} dynamic-slice(%q0, %q1, %q1), dynamic_slice_sizes={1,1024}
  ROOT %twice = f32[1,1024]{1,0} add(%slice, %slice)
}

%product (r0: f32[1024,1024]) -> f32[1024,1024] {
  %r0 = f32[1024,1024]{1,0} parameter(0)
  ROOT %dot = f32[1024,1024]{1,0} dot(%r0, %r0)
}

ENTRY %main (a: f32[32,1024], b: f32[1024], c: s32[], d: f32[1024,1024]) -> f32[32,1024] {
  %a = f32[32,1024]{1,0} parameter(0)
  %b = f32[1024]{0} parameter(1)
  %c = s32[] parameter(2)
  %d = f32[1024,1024]{1,0:T(8,128)} parameter(3)
  %near = f32[1024]{0:T(1024)S(1)} copy(%b)
  %square = f32[1024,1024]{1,0} fusion(%d), kind=kCustom, calls=%product
  %one = f32[1,1024]{1,0} fusion(%a, %c), kind=kLoop, calls=%slices, metadata={op_name="jit(f)/jvp()/add"}
  %sum = f32[1024,1024]{1,0} add(%square, %d), metadata={op_name="jit(f)/transpose(jvp())/add"}
  ROOT %in_place = f32[32,1024]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%body
}
"""
    found = {access.name: access for access in traffic.accesses(hlo.parse(text))}
    row, matrix = 4096, 4 * 1024**2
    assert {name: access.bytes for name, access in found.items()} == {
        "near": row,  # read here, written to a core's own memory
        "one": 2 * row + 4,
        "sum": 3 * matrix,
        "in_place": 2 * row + 4,
    }
    assert (found["one"].phase, found["sum"].phase, found["near"].phase) == ("forward", "backward", "optimizer")


# ---- How long it takes

CHIP = dataclasses.replace(A100, hbm_bandwidth=1e12, peak_flops=1e14, link_bandwidth=1e11)
ASSUMED = roofline.Assumptions(
    product_fraction=0.5,
    attention_fraction=0.25,
    hbm_fraction=0.5,
    link_fraction=0.5,
    latency=1e-3,
    memory_fraction=0.9,
    calibration="none",
)


def collective(kind, size, executions, asynchronous, op_name):
    return hlo.Collective("c", kind, "bf16", size, executions, ((0, 1, 2, 3), (4, 5, 6, 7)), asynchronous, op_name, ())


def test_the_time_of_a_step_by_hand():
    products = [
        flops.Product("forward", 1e12, 1e9, 2, False),  # 2 x 20 ms at 5e13 FLOP/s
        flops.Product("backward", 1e12, 1e9, 1, True),  # 40 ms at 2.5e13
        flops.Product("backward", 1e9, 5e9, 1, False),  # 10 ms: its operands, at 5e11 bytes/s
    ]
    accesses = [traffic.Access("a", "forward", 5 * 10**9, 1), traffic.Access("b", "optimizer", 10**9, 5)]  # 10 ms each
    collectives = [
        # 3/4 of 4e9 bytes at 5e10 bytes/s: 60 ms and 1 of latency.
        collective("all-gather", 4 * 10**9, 1, True, "jit(f)/jvp()/all_gather"),
        # Twice 3/4 of 1e9: 30 ms and 1, twice.
        collective("all-reduce", 10**9, 2, False, "jit(f)/transpose(jvp())/psum"),
    ]
    time = roofline.step_time(CHIP, ASSUMED, products, accesses, collectives, lambda c: (1e11, "within hosts"))
    forward, backward, optimizer = (time.phases[phase] for phase in flops.PHASES)
    assert dataclasses.astuple(forward)[:4] == pytest.approx((0.040, 0.010, 0.050, 0.011))
    assert dataclasses.astuple(backward)[:4] == pytest.approx((0.050, 0.0, 0.0, 0.062))
    assert dataclasses.astuple(optimizer)[:4] == pytest.approx((0.0, 0.010, 0.0, 0.0))
    assert forward.kinds["gather"] == pytest.approx((0.050, 0.011)) and backward.kinds["gather"] == (0, 0)
    assert backward.kinds["reduce"] == pytest.approx((0, 0.062)) and forward.kinds["reduce"] == (0, 0)
    assert time.seconds == pytest.approx(0.061 + 0.112 + 0.010)
    assert time.limit == "network"  # 123 ms, of products 90
    assert roofline.step_time(CHIP, ASSUMED, products, accesses, [], lambda c: (1.0, "")).limit == "products"


@pytest.mark.parametrize("name", targets.CHIPS)
def test_there_are_assumptions_for_every_chip(name):
    assumed = roofline.assumptions(name)
    assert all(0 < getattr(assumed, f"{part}_fraction") <= 1 for part in ("product", "attention", "hbm", "link"))
    assert assumed.calibration


def test_what_a_run_takes(compiled):
    plan = report.make_plan(compiled, price=2.0)
    steps, seconds = compiled.config.train.steps, plan.time.seconds
    assert plan.tokens_per_second * seconds == pytest.approx(16 * 16)
    assert plan.days * 86_400 == pytest.approx(steps * seconds)
    assert plan.device_hours == pytest.approx(8 * steps * seconds / 3600)
    assert plan.kwh == pytest.approx(plan.device_hours * 0.4 * 1.2)
    assert plan.mfu == pytest.approx(plan.model_flops / (seconds * 8 * 312e12))
    found = json.loads(json.dumps(plan.as_dict()))
    assert found["cost"] == 2 * plan.device_hours and found["co2_kg"] == pytest.approx(plan.kwh * 0.373)
    assert sum(found["memory"]["parts"].values()) == found["memory"]["total"] == compiled.memory_bytes
    text = report.as_text(plan)
    assert all(part in text for part in memory.PARTS) and "not measured" in text and "assumed" in text
    assert max(map(len, text.splitlines())) <= 120
    unknown_power = dataclasses.replace(compiled, target=targets.parse("tpu-v5e:2x4"))
    assert "not published" in "\n".join(report._run(dataclasses.replace(plan, compiled=unknown_power)))


def test_a_plan_is_drawn(compiled, tmp_path):
    drawing.draw(report.make_plan(compiled), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


# ---- Other settings


def pretend(compiled, needs):
    """A compiler in place of the real one: `needs` says how many bytes a configuration takes."""
    tried = []

    def compile_one(config, target):
        tried.append(config)
        size = needs(config)
        if size == "refused":
            raise compiled_lib.OutOfMemory(10**12)
        return dataclasses.replace(
            compiled, config=config, target=target, memory=dict.fromkeys(memory.PARTS, 0) | {"saved activations": size}
        )

    return compile_one, tried


TARGET = targets.Target(A100, (1, 8))
TOO_MUCH = 10**12


def test_the_nearest_setting_that_fits(compiled):
    config = tiny.replace(train={"global_batch_size": 32}, mesh={"fsdp": -1})

    def needs(config):
        if config.model.remat == "none":
            return "refused"
        return TOO_MUCH if config.train.gradient_accumulation_steps == 1 else 10**9

    compile_one, tried = pretend(compiled, needs)
    plan = search.nearest_fit(config, TARGET, None, compile_one)
    assert plan and plan.fits
    assert search.changes(config, plan.compiled.config) == "--model.remat matmuls --train.gradient_accumulation_steps 2"
    # What needs more than what was too much is not tried.
    assert len(tried) == len(set(tried)) < 10


def test_no_setting_fits(compiled):
    compile_one, tried = pretend(compiled, lambda config: TOO_MUCH)
    assert search.nearest_fit(tiny.replace(train={"global_batch_size": 32}), TARGET, None, compile_one) is None
    assert len(tried) == 1  # the one that needs least


def test_a_search_ranks_what_fits(compiled):
    def needs(config):
        return TOO_MUCH if config.model.remat == "none" and config.train.gradient_accumulation_steps < 4 else 10**9

    compile_one, _ = pretend(compiled, needs)
    config = tiny.replace(train={"global_batch_size": 32})
    plans = search.search(config, TARGET, compile_one)
    kept = {
        (
            p.compiled.config.model.remat,
            p.compiled.config.train.gradient_accumulation_steps,
            p.compiled.config.model.unroll,
        )
        for p in plans
    }
    assert kept == {
        *(("none", 4, unroll) for unroll in (1, 2)),
        *((remat, 1, unroll) for remat in ("matmuls", "full") for unroll in (1, 2)),
    }
    seconds = [plan.time.seconds for plan in plans]
    assert seconds == sorted(seconds)
    assert len(list(search.search_table(config, plans))) == 1 + len(plans)
    assert json.loads(json.dumps(search.as_dicts(config, plans)))[0]["memory"]["fits"]


# ---- What a user is told


def plan_command(*args, env):
    command = [sys.executable, "-m", "biomedlm_jax.plan", *args]
    env = env | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # as tests are compiled
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=600)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": {"replica": 3}}, "mesh.replica x mesh.fsdp must be the number of devices: 3 x 42 is not the 128"),
        ({"mesh": {"replica": 2, "fsdp": 8}}, "2 x 8 is not the 128 of a100-40gb:16x8"),
        ({"train": {"global_batch_size": 64}}, "has 128 devices and a step only 64 sequences"),
        (
            {"train": {"global_batch_size": 1024, "gradient_accumulation_steps": 16}},
            "a step only 1,024 sequences in 16 parts are 64 at once",
        ),
        ({"train": {"global_batch_size": 192}}, "the batch does not divide over a100-40gb:16x8: 192 sequences"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused_before_anything_is_compiled(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compiled_lib.check(tiny.replace(**settings), targets.parse("a100-40gb:16x8"))


def test_more_devices_than_sequences():
    config = tiny.replace(train={"global_batch_size": 1024})
    with pytest.raises(UserError, match="has 2,048 devices and a step only 1,024 sequences: devices would have none"):
        compiled_lib.check(config, targets.parse("a100-40gb:256x8"))
    compiled_lib.check(config, targets.parse("a100-40gb:128x8"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--target", "a100:16x8"), "error: no target is called 'a100'; did you mean a100-40gb?"),
        ((), "target"),
        (("--target", "a100-40gb:1x8", "--price", "-1"), "error: --price must not be negative"),
        (("--target", "a100-40gb:1x8", "--plot", "no/such/folder.png"), "there is no such folder"),
        (("--target", "a100-40gb:1x8", "--model.n_layers", "3"), "did you mean model.n_layer?"),
    ],
)
def test_mistakes_end_in_one_line(args, message, subprocess_env):
    result = plan_command(*args, env=subprocess_env)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


SMALL = ("--model.n_embd", "256", "--model.n_layer", "2", "--model.n_head", "2", "--model.vocab_size", "512")


@pytest.mark.parametrize("target", ["a100-40gb:2x8", "tpu-v5e:2x4"])
def test_a_small_model_is_planned_with_the_real_compilers(target, tmp_path, subprocess_env):
    require(target.partition(":")[0])
    picture = tmp_path / "plan.png"
    args = ("--target", target, "--train.global_batch_size", "64", "--json", "--plot", str(picture))
    result = plan_command(*SMALL, *args, env=subprocess_env)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["target"] == target and found["unknown"] == [] and picture.is_file()
    assert sum(found["memory"]["parts"].values()) == found["memory"]["total"] > 0
    assert {exchange["link"] for exchange in found["exchanges"]} == {"ICI" if "tpu" in target else "between hosts"}
    phases = found["time"]["phases"]
    assert phases["backward"]["products"] > phases["forward"]["products"] > 0
    assert 0 < found["mfu"] < 1


def test_fine_tuning_is_planned_with_a_real_compiler(subprocess_env):
    require("a100-40gb")
    args = ("--task.name", "pubmedqa", "--lora.rank", "8", "--model.attn_pdrop", "0", "--target", "a100-40gb:1x2")
    result = plan_command(*SMALL, *args, "--json", env=subprocess_env)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["unknown"] == [] and found["settings"]["sequences_per_device"] == 8
    assert found["memory"]["parts"]["moments"] < found["memory"]["parts"]["parameters"]


@pytest.mark.slow
def test_the_published_run_is_planned_for_its_pod(subprocess_env):
    require("a100-40gb")
    result = plan_command("--config", CONFIG_FILE, "--target", "a100-40gb:16x8", "--json", env=subprocess_env)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    parts = found["memory"]["parts"]
    assert found["memory"]["total"] < 40e9 and found["settings"]["sequences_per_device"] == 8
    # 2.594e9 float32 parameters over 128 devices, and twice as many moments.
    assert parts["parameters"] == pytest.approx(4 * 2_594_247_680 / 128, rel=0.01)
    assert parts["moments"] == pytest.approx(8 * 2_594_247_680 / 128, rel=0.01)
    # Of 32 layers, in bfloat16, the results of the four products and of attention, and the block's input.
    assert parts["saved activations"] == pytest.approx(32 * 8192 * 2560 * 2 * (3 + 1 + 1 + 4 + 1), rel=0.05)
    assert found["flops"]["model"] / 2**20 == pytest.approx(16.57e9, rel=0.001)


@pytest.mark.slow
def test_what_does_not_fit_ends_with_the_nearest_that_does(subprocess_env):
    require("a100-40gb")
    args = ("--config", CONFIG_FILE, "--target", "a100-40gb:1x8", "--train.global_batch_size", "128")
    result = plan_command(*args, "--model.remat", "none", env=subprocess_env)
    assert result.returncode == 1 and "DOES NOT FIT" in result.stdout
    assert "the nearest that fits" in result.stderr and "--model.remat" in result.stderr


def test_a_mesh_of_a_target_is_the_configurations(compiled):
    assert compiled.mesh == {"replica": 2, "fsdp": 4}
    assert search.setting_of(compiled.config, compiled.target) == search.Setting(1, 1, False, 4)
    assert compiled.config.mesh == MeshConfig(2, 4)


def test_what_the_compilers_say_in_their_own_ways():
    """A TPU's compiler that gives up, and a program that XLA cannot print."""
    for message, size in (
        (
            "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (149.06G) exceeds available HBM (30.75G)",
            149.06,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm.", 17.5),
        ("RESOURCE_EXHAUSTED: no more", 0),
    ):
        error = compiled_lib._out_of_memory(RuntimeError(message))
        assert isinstance(error, compiled_lib.OutOfMemory) and error.memory_bytes == int(size * 2**30)
    other = RuntimeError("INTERNAL: something else")
    assert compiled_lib._out_of_memory(other) is other

    def as_text():
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update expects one operand\nand more")

    assert compiled_lib._as_text(types.SimpleNamespace(as_text=as_text)) == ""
