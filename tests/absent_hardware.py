"""Compiles for GPUs and TPUs on a machine that has neither, with the real compilers.

biomedlm_jax.targets has the devices. As a command, it prints what the attention kernels were compiled to:

    python tests/absent_hardware.py [TARGET ...]
"""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from biomedlm_jax import sharding, targets
from biomedlm_jax.config import MeshConfig
from biomedlm_jax.kernels.flash_attention import flash_attention

targets.keep_off_devices()

GPUS = tuple(name for name, chip in targets.CHIPS.items() if chip.platform == "gpu")
# Slices of eight chips.
TPUS = {"v4": "tpu-v4:2x2x2", "v5e": "tpu-v5e:2x4", "v5p": "tpu-v5p:2x2x2", "v6e": "tpu-v6e:2x4"}
TARGETS = (*GPUS, *TPUS)

# Names of the custom calls that the kernels become.
KERNEL_CALLS = r'custom_call_target="(?:__gpu\$xla\.gpu\.triton|mosaic_gpu_v2|tpu_custom_call)"'


def missing(target: str) -> str:
    """What has to be installed to compile for the target; empty if all is there."""
    return targets.missing(targets.parse(TPUS[target]).chip.name if target in TPUS else target)


def devices(target: str, count: int) -> list[Any]:
    """So many devices of the target, of hosts of eight."""
    name = TPUS.get(target) or f"{target}:{max(1, count // 8)}x{min(count, 8)}"
    return targets.parse(name).devices()[:count]


def make_mesh(target: str, count: int = 1) -> Mesh:
    """The mesh of so many devices of the target, for `jax.set_mesh` while a program is lowered."""
    return sharding.make_mesh(MeshConfig(), devices(target, count))


def compile_attention(
    target: str, head_dim: int, dtype: Any = jnp.bfloat16, *, seq: int = 1000, packed: bool = False, backend: Any = None
) -> Any:
    """Flash attention forward and backward, compiled for one device."""
    mesh = make_mesh(target)

    def argument(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    def forward_and_backward(qkv: Any, scale: Any, segment_ids: Any) -> Any:
        out, vjp = jax.vjp(lambda qkv: flash_attention(qkv, scale, segment_ids, backend=backend), qkv)
        return out, vjp(out)[0]

    arguments = (
        argument((2, seq, 3 * 4, head_dim), dtype),
        argument((), jnp.float32),
        argument((2, seq), jnp.int32) if packed else None,
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(forward_and_backward).lower(*arguments)
    return lowered.compile()


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """What a kernel was compiled to for a GPU."""

    name: str
    registers: int
    """Of a thread, as launched."""
    spills: int
    """Bytes of registers stored to local memory and loaded from it."""
    shared: int
    """Bytes of shared memory of a block."""
    opcodes: tuple[str, ...]
    """Of the machine code in order, without their modifiers."""

    @property
    def instructions(self) -> Counter:
        """How often each opcode occurs."""
        return Counter(self.opcodes)


def machine_code(target: str, head_dim: int, backend: str, packed: bool = False) -> list[MachineCode]:
    """The machine code of one backend's kernels, forward and backward, in bfloat16, for a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            # Read when jax starts, hence another process.
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_emitter_re=.*",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_SASS": "1",
            "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # as tests are compiled
        }
        call = f"compile_attention({target!r}, {head_dim}, backend={backend!r}, packed={packed})"
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom absent_hardware import *\n{call}"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
        if result.returncode:
            raise RuntimeError(f"{call}:\n{result.stderr}")
        if backend == "mosaic_gpu":
            return _of_mosaic(result.stdout)
        return _of_triton(Path(folder))


def _of_mosaic(printed: str) -> list[MachineCode]:
    """From what Mosaic GPU prints: for each kernel what ptxas says, the machine code, and the code that launches it."""
    kernels = re.split(r"(?=ptxas info +: \d+ bytes gmem)", printed)[1:]
    return [
        _parse(
            kernel,
            kernel,
            r"call .*@mosaic_gpu_(?:launch_kernel|build_kernel_spec)\(ptr %\w+(?:, i32 \d+){9}, i32 (\d+)",
        )
        for kernel in kernels
    ]


def _of_triton(folder: Path) -> list[MachineCode]:
    """From XLA's dumps: PTX, which we assemble as XLA did, and the list of launches."""
    launches = "\n".join(path.read_text() for path in folder.glob("*.thunk_sequence.txt"))
    found = []
    for path in sorted(folder.glob("*.ptx")):
        ptx, cubin = path.read_text(), path.with_suffix(".cubin")
        name, arch = re.search(r"\.entry (flash_attention\w+)\(", ptx), re.search(r"\.target (\w+)", ptx)
        if name and arch:
            ptxas = subprocess.run(
                [targets.cuda_tool("ptxas"), "-v", f"-arch={arch[1]}", path, "-o", cubin],
                capture_output=True,
                text=True,
                check=True,
            )
            sass = subprocess.run(
                [targets.cuda_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
            )
            found.append(_parse(ptxas.stderr + launches, sass.stdout, rf" {name[1]} grid.*shared_memory: (\d+) bytes"))
    return found


def _parse(printed: str, sass: str, shared: str) -> MachineCode:
    def number(pattern: str) -> int:
        found = re.search(pattern, printed)
        assert found, f"{pattern} is not in:\n{printed[:2000]}"
        return int(found[1])

    name = re.search(r"Compiling entry function '(\w+?)(_mosaic_gpu_kernel)?'", printed)
    assert name
    return MachineCode(
        name=name[1],
        registers=number(r"Used (\d+) registers"),
        spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        shared=number(shared),
        opcodes=tuple(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", sass)),
    )


def main() -> None:
    """Prints a line for each kernel, target and head size."""
    print(f"jax {jax.__version__}; bfloat16; products: HGMMA or HMMA; local: LDL and STL, loads and stores of spills")
    print(f"{'target':10} head {'kernel':34} registers  spilled   shared products  local")
    for target in sys.argv[1:] or TARGETS:
        if missing(target):
            print(f"{target:10} {missing(target)}")
            continue
        for head_dim in (64, 128):
            if target in TPUS:
                text = compile_attention(target, head_dim).as_text()
                for name, memory in re.findall(rf"%(\S+) = .*{KERNEL_CALLS}.*used_scoped_memory\D*1\D*0\D*(\d+)", text):
                    print(f"{target:10} {head_dim:4} {name:34} {'':18} {int(memory):8,} of VMEM")
                continue
            for backend in ("triton", "mosaic_gpu") if target.startswith("h") else ("triton",):
                for packed in (False, True):
                    for code in machine_code(target, head_dim, backend, packed):
                        name = f"{backend}: {code.name.removeprefix('flash_attention_')}{' packed' * packed}"
                        count = code.instructions
                        print(
                            f"{target:10} {head_dim:4} {name:34} {code.registers:9} {code.spills:8,} {code.shared:8,} "
                            f"{count['HGMMA'] + count['HMMA']:8} {count['LDL'] + count['STL']:6}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
