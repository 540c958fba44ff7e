"""Programs as XLA's compilers print them, and what is read off them."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from biomedlm_jax import hlo

# As XLA's GPU compiler prints it: start and done, once apart and once not, in a loop; a permute handed on.
GPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[256,8192]{1,0})->bf16[256,8192]{1,0}}, num_partitions=16

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%body (arg: (s32[], bf16[256,8192], bf16[256,8192])) -> (s32[], bf16[256,8192], bf16[256,8192]) {
  %arg = (s32[], bf16[256,8192]{1,0}, bf16[256,8192]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %shard = bf16[256,8192]{1,0} get-tuple-element(%arg), index=1
  %all-gather-start = ((bf16[256,8192]{1,0}), bf16[2048,8192]{1,0}) all-gather-start(%shard), channel_id=1, replica_groups=mesh['replica'=2,'fsdp'=8] {'fsdp'}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(f)/while/body/all_gather" stack_frame_id=27}, backend_config={"collective_backend_config":{"is_sync":false}}
  %grads = bf16[2048,8192]{1,0} custom-call(%i), custom_call_target="__cublas$gemm"
  %all-gather-done = bf16[2048,8192]{1,0} all-gather-done(%all-gather-start)
  %all-gather-start.1 = ((bf16[256,8192]{1,0}), bf16[2048,8192]{1,0}) all-gather-start(%shard), channel_id=2, replica_groups=[2,8]<=[16], dimensions={0}, use_global_device_ids=true
  %tuple.9 = (s32[], s32[]) tuple(%i, %i)
  %all-gather-done.1 = bf16[2048,8192]{1,0} all-gather-done(%all-gather-start.1)
  %reduce-scatter-start = ((bf16[2048,8192]{1,0}, bf16[8192,2048]{1,0}), (bf16[256,8192]{1,0}, bf16[1024,2048]{1,0})) reduce-scatter-start(%grads, %all-gather-done), channel_id=6, replica_groups=mesh['replica'=2,'fsdp'=8] {'fsdp'}, use_global_device_ids=true, dimensions={0}, to_apply=%add
  %dot = bf16[2048,2048]{1,0} fusion(%grads), kind=kCustom, calls=%product
  %reduce-scatter-done = (bf16[256,8192]{1,0}, bf16[1024,2048]{1,0}) reduce-scatter-done(%reduce-scatter-start)
  %mine = bf16[256,8192]{1,0} get-tuple-element(%reduce-scatter-done), index=0
  ROOT %result = (s32[], bf16[256,8192]{1,0}, bf16[256,8192]{1,0}) tuple(%i, %mine, %mine)
}

%product (p: bf16[2048,8192]) -> bf16[2048,2048] {
  %p = bf16[2048,8192]{1,0} parameter(0)
  ROOT %d = bf16[2048,2048]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%condition (arg.1: (s32[], bf16[256,8192], bf16[256,8192])) -> pred[] {
  %arg.1 = (s32[], bf16[256,8192]{1,0}, bf16[256,8192]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %end = s32[] constant(12)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

%wrapped (p.1: bf16[256,8192]) -> bf16[256,8192] {
  %p.1 = bf16[256,8192]{1,0} parameter(0)
  ROOT %all-to-all.1 = bf16[256,8192]{1,0} all-to-all(%p.1), replica_groups=[8,2]<=[2,8]T(1,0), dimensions={0}
}

ENTRY %main (w: bf16[256,8192]) -> bf16[256,8192] {
  %w = bf16[256,8192]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[256,8192]{1,0}, bf16[256,8192]{1,0}) tuple(%zero, %w, /*index=2*/%w)
  %while.1 = (s32[], bf16[256,8192]{1,0}, bf16[256,8192]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0","step":"1"}}
  %out = bf16[256,8192]{1,0} get-tuple-element(%while.1), index=1
  %async = ((bf16[256,8192]{1,0}), bf16[256,8192]{1,0}, s32[]) async-start(%out), calls=%wrapped
  %again = bf16[256,8192]{1,0} copy(%out)
  %moved = bf16[256,8192]{1,0} async-done(%async)
  %all-reduce.3 = (f32[1024]{0}, f32[]) all-reduce(%norm, %loss), replica_groups={{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}, to_apply=%add
  %norm = f32[1024]{0} constant({...})
  %loss = f32[] constant(0)
  %collective-permute-start = (bf16[256,8192]{1,0}, bf16[256,8192]{1,0}, u32[], u32[]) collective-permute-start(%moved), source_target_pairs={{0,1},{1,2}}
  ROOT %collective-permute-done = bf16[256,8192]{1,0} collective-permute-done(%collective-permute-start)
}
"""  # noqa: E501

# As XLA's TPU compiler prints it: tiled layouts, a reduce-scatter that is a fusion, an all-gather in several fusions.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%all-reduce-scatter.clone.1 (input.5: bf16[2048,8192]) -> bf16[560,8192] {
  %input.5 = bf16[2048,8192]{1,0:T(8,128)(2,1)} parameter(0)
  %constant.87 = bf16[]{:T(256)} constant(0)
  %pad.5 = bf16[2240,8192]{1,0:T(8,128)(2,1)} pad(%input.5, %constant.87), padding=0_192x0_0
  %all-reduce.9 = bf16[2240,8192]{1,0:T(8,128)(2,1)} all-reduce(%pad.5), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%region_4.5.clone
  ROOT %dynamic-slice.1 = bf16[560,8192]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={560,8192}
}

%fused_computation.28 (param_0.89: bf16[1,2048,2048]) -> (bf16[1,2048,2048], bf16[1,8192,2048]) {
  %param_0.89 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.15 = bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.89), channel_id=3, replica_groups=mesh['replica'=2,'fsdp'=4] {'fsdp'}, dimensions={1}, use_global_device_ids=true
  ROOT %tuple.1 = (bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}, bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)}) tuple(%param_0.89, %all-gather.15)
}

%async_collective_fusion.71 (param_0.93: bf16[1,2048,2048], param_10.6: bf16[4096,2048]) -> bf16[4096,8192] {
  %param_0.93 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.17 = bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.93), channel_id=3, replica_groups=mesh['replica'=2,'fsdp'=4] {'fsdp'}, dimensions={1}, use_global_device_ids=true
  ROOT %convolution.1 = bf16[4096,8192]{1,0:T(8,128)(2,1)} convolution(%param_0.93, %all-gather.17), dim_labels=bf_io->bf
}

%fused_computation.30 (param_0.95: bf16[1,2048,2048]) -> bf16[1,8192,2048] {
  %param_0.95 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.19 = bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.95), channel_id=3, replica_groups=mesh['replica'=2,'fsdp'=4] {'fsdp'}, dimensions={1}, use_global_device_ids=true
}

%region_1.2_spmd (wide.param: (s32[], bf16[1,2048,2048])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(8)
  %wide.param = (s32[]{:T(128)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%wide.param), index=0
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.5), direction=LT
}

%region_0.1_spmd (param.2: (s32[], bf16[1,2048,2048])) -> (s32[], bf16[1,2048,2048]) {
  %param.2 = (s32[]{:T(128)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.2 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} get-tuple-element(%param.2), index=1
  %async-collective-start = (bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)S(1)}) fusion(%get-tuple-element.2), kind=kCustom, calls=%fused_computation.28
  %fusion.71 = bf16[4096,8192]{1,0:T(8,128)(2,1)} fusion(%get-tuple-element.2), kind=kOutput, calls=%async_collective_fusion.71
  %async-collective-done = bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.2), kind=kCustom, calls=%fused_computation.30, metadata={op_name="jit(f)/while/body/all_gather"}
  %fusion.67 = bf16[560,8192]{1,0:T(8,128)(2,1)} fusion(%fusion.71), kind=kCustom, calls=%all-reduce-scatter.clone.1
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}) tuple(%get-tuple-element.2, %get-tuple-element.2)
}

ENTRY %main (p: bf16[1,2048,2048]) -> bf16[1,2048,2048] {
  %p = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %constant.1 = s32[]{:T(128)} constant(2)
  %copy.1 = s32[]{:T(128)} copy(%constant.1)
  %tuple.3 = (s32[]{:T(128)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}) tuple(%copy.1, %p)
  %while.30 = (s32[]{:T(128)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}) while(%tuple.3), condition=%region_1.2_spmd, body=%region_0.1_spmd
  ROOT %get-tuple-element.3 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} get-tuple-element(%while.30), index=1
}
"""  # noqa: E501

MATRIX = 2 * 2048 * 8192


def by_name(text):
    return {collective.name: collective for collective in hlo.collectives(hlo.parse(text))}


def test_a_gpu_program():
    found = by_name(GPU)
    assert set(found) == {
        "all-gather-start",
        "all-gather-start.1",
        "reduce-scatter-start",
        "all-to-all.1",
        "all-reduce.3",
        "collective-permute-start",
    }
    rows = (tuple(range(8)), tuple(range(8, 16)))
    gather = found["all-gather-start"]
    assert (gather.kind, gather.dtype, gather.bytes, gather.executions) == ("all-gather", "bf16", MATRIX, 12)
    assert gather.groups == rows == found["all-gather-start.1"].groups
    assert gather.op_name == "jit(f)/while/body/all_gather"
    assert gather.operands == (hlo.Shape("bf16", (256, 8192)),)
    assert gather.wire_bytes == MATRIX * 7 / 8
    scatter = found["reduce-scatter-start"]
    assert (scatter.kind, scatter.bytes, scatter.executions) == ("reduce-scatter", 2 * MATRIX, 12)
    assert scatter.wire_bytes == 2 * MATRIX * 7 / 8
    moved = found["all-to-all.1"]
    assert (moved.kind, moved.bytes, moved.executions) == ("all-to-all", MATRIX // 8, 1)
    reduced = found["all-reduce.3"]
    assert (reduced.kind, reduced.dtype, reduced.bytes) == ("all-reduce", "f32", 4100)
    assert reduced.wire_bytes == 4100  # two devices: half of it sent to be summed, half of the sums sent back
    assert moved.groups == reduced.groups == tuple((i, i + 8) for i in range(8))
    assert found["collective-permute-start"].groups == ((0, 1), (1, 2))


def test_a_dump_names_elements_of_tuples():
    """As files written with xla_dump_to do: %arg#1 instead of an instruction that takes it out."""
    lines = [line for line in GPU.splitlines() if not re.search(r"%(?:i|shard) = .*get-tuple-element\(%arg\)", line)]
    text = (
        "\n".join(lines).replace("(%shard)", "(%arg#1)").replace("tuple(%i,", "tuple(%arg#0,").replace("%i)", "%arg#0)")
    )
    assert "%arg#1" in text and hlo.collectives(hlo.parse(text)) == hlo.collectives(hlo.parse(GPU))


def test_asynchronous_is_what_has_compute_between_its_start_and_its_end():
    found = by_name(GPU)
    assert {name for name, collective in found.items() if collective.asynchronous} == {
        "all-gather-start",
        "reduce-scatter-start",
        "all-to-all.1",  # inside async-start
    }


def test_a_tpu_program():
    found = by_name(TPU)
    assert set(found) == {"all-gather.15", "all-reduce.9"}  # not the continuations of the one all-gather
    gather, scatter = found["all-gather.15"], found["all-reduce.9"]
    assert (gather.kind, gather.bytes, gather.asynchronous) == ("all-gather", MATRIX, True)
    assert (scatter.kind, scatter.bytes, scatter.asynchronous) == ("reduce-scatter", 2 * 2240 * 8192, False)
    assert gather.executions == scatter.executions == 6  # from 2 to 8
    assert gather.groups == scatter.groups == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_loops_multiply_and_those_of_unknown_length_are_told():
    module = hlo.parse(GPU)
    assert module.unknown_loops == () and module.devices == 16
    assert {instruction.name: n for _, instruction, n in module}["d"] == 12  # in a fusion in the loop
    text = GPU.replace('"known_trip_count":{"n":"12"},', "")
    assert by_name(text)["all-gather-start"].executions == 12  # from the condition
    fused = text.replace(
        "ROOT %less = pred[] compare(%i.1, %end), direction=LT",
        "ROOT %less = pred[] fusion(%i.1), kind=kLoop, calls=%compare",
    ).replace(
        "%condition (arg.1",
        """%compare (p.9: s32[]) -> pred[] {
  %p.9 = s32[] parameter(0)
  %end.9 = s32[] constant(11)
  ROOT %less.9 = pred[] compare(%p.9, %end.9), direction=LE
}

%condition (arg.1""",
        1,
    )
    assert "%compare (p.9" in fused and by_name(fused)["all-gather-start"].executions == 12
    text = text.replace("direction=LT", "direction=NE")
    assert hlo.parse(text).unknown_loops == ("while.1",)
    assert by_name(text)["all-gather-start"].executions == 1


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", ((0, 2, 1, 3),)),
        ("replica_groups={}", (tuple(range(8)),)),
    ],
)
def test_replica_groups(text, groups):
    program = f"""HloModule m, num_partitions=8

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %all-reduce = f32[8]{{0}} all-reduce(%p), channel_id=1, {text}, to_apply=%add
}}
"""
    assert by_name(program)["all-reduce"].groups == groups


def test_bytes_of_types():
    text = "(f32[2,3]{1,0:T(8,128)}, bf16[5]{0:T(1024)(128)(2,1)S(1)}, pred[], s4[8]{0}, f8e4m3fn[7], token[])"
    assert [shape.bytes for shape in hlo.shapes(text)] == [24, 10, 1, 4, 7, 0]


def test_what_is_no_program():
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        hlo.parse("stablehlo.add")


def test_a_program_compiled_here():
    """Sharded weights of 3 layers in a scan, on a mesh of 2 x 4."""
    mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    sharded, rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P(("replica", "fsdp")))

    def loss(weights, x):
        def layer(x, weight):
            return jnp.tanh(x @ jax.lax.all_gather(weight, "fsdp", tiled=True)), None

        return jax.lax.psum(jnp.sum(jax.lax.scan(layer, x, weights)[0]), ("replica", "fsdp"))

    specs = (P(None, "fsdp"), P(("replica", "fsdp")))
    gradient = jax.grad(jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P()))
    weights = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32, sharding=sharded)
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=rows)
    compiled = jax.jit(gradient, out_shardings=sharded).lower(weights, x).compile()
    found = hlo.collectives(hlo.parse(compiled.as_text()))
    bytes_of = {}
    for collective in found:
        if collective.bytes > 1000:
            kind = collective.kind
            bytes_of[kind] = bytes_of.get(kind, 0) + collective.bytes * collective.executions
            assert collective.executions == 3
            assert collective.groups == (
                tuple((i, i + 4) for i in range(4)) if kind == "all-reduce" else ((0, 1, 2, 3), (4, 5, 6, 7))
            )
    matrices = 3 * 64 * 64 * 4
    assert bytes_of["all-gather"] in (matrices, 2 * matrices)  # gathered again for the backward pass, or kept
    assert bytes_of["reduce-scatter"] == matrices
    assert bytes_of["all-reduce"] in (matrices, matrices // 4)  # before it is scattered, or after
