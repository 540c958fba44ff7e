"""Memory and time of converting BioMedLM 2.7B between a run's folder and a Hugging Face folder, with random weights.

    python benchmarks/export.py --output benchmarks/results/export_cpu.json

Needs 16 GB of disk in --scratch. Each conversion is a process of its own, as the command would be; its peak memory is
that of the resident set, as the kernel counts it, mapped files included.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GPT2 = {"vocab_size": 28_896, "n_positions": 1024, "n_embd": 2560, "n_layer": 32, "n_head": 20}


def peak_bytes() -> int:
    # Linux counts kibibytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make_run(folder: Path, layers: int) -> dict:
    import numpy as np

    from biomedlm_jax import checkpoint, huggingface
    from biomedlm_jax.config import Config, ModelConfig, save_config

    config = ModelConfig(**{**GPT2, "n_layer": layers})
    rng = np.random.default_rng(0)
    folder.mkdir()
    arrays = huggingface.create_checkpoint(folder, config)
    for tensor in huggingface.tensors(config):
        tensor.of(arrays).write(rng.standard_normal(tensor.shape, dtype=np.float32) * np.float32(0.02)).result()
    save_config(Config(model=config), folder / checkpoint.CONFIG_FILE)
    return {}


def export(run: Path, output: Path, dtype: str, format: str) -> dict:
    from biomedlm_jax import exporting

    before = peak_bytes()
    written = exporting.export(run, output, dtype=dtype, format=format)  # type: ignore[arg-type]
    return {
        "imports_bytes": before,
        "total_bytes": written.total_bytes,
        "files": len(written.files),
        "largest_file_bytes": max(file.stat().st_size for file in written.files),
    }


def import_model(directory: Path, run: Path) -> dict:
    from biomedlm_jax import huggingface

    before = peak_bytes()
    huggingface.import_model(directory, run)
    return {"imports_bytes": before}


STAGES = {"make_run": make_run, "export": export, "import_model": import_model}


def run_stage(stage: str, *args: object) -> dict:
    """A function of this file in a process of its own; its result, with the seconds and the peak memory it took."""
    command = [sys.executable, __file__, "--stage", stage, *map(str, args)]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    print(stage, *args, result, file=sys.stderr)
    return result


def run_in_this_process(stage: str, args: list[str]) -> None:
    begin = time.perf_counter()
    result = STAGES[stage](*[int(arg) if arg.isdigit() else Path(arg) if os.sep in arg else arg for arg in args])
    print(json.dumps({**result, "seconds": round(time.perf_counter() - begin, 1), "peak_bytes": peak_bytes()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/export_cpu.json", help="JSON file to write")
    parser.add_argument("--scratch", default=None, help="folder for the models; by default the temporary one")
    parser.add_argument("--layers", type=int, default=GPT2["n_layer"], help="fewer make a smaller model")
    parser.add_argument("--with-import", action="store_true", help="also import what was exported")
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        run_in_this_process(args.stage[0], args.stage[1:])
        return
    results = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        run = Path(scratch, "run")
        results["make_run"] = run_stage("make_run", run, args.layers)
        for dtype, format in (("bfloat16", "safetensors"), ("bfloat16", "pytorch")):
            output = Path(scratch, f"{dtype}-{format}")
            result = run_stage("export", run, output, dtype, format)
            # The project's bound: 1.5 x the largest shard + 2 GB.
            result["bound_bytes"] = int(1.5 * result["largest_file_bytes"] + 2e9)
            results[f"export_{dtype}_{format}"] = result
            if args.with_import:
                subprocess.run(["rm", "-r", run], check=True)
                results[f"import_{dtype}_{format}"] = run_stage("import_model", output, run)
            subprocess.run(["rm", "-r", output], check=True)
    packages = ("biomedlm_jax", "jax", "numpy", "orbax-checkpoint", "tensorstore", "safetensors", "torch")
    report = {
        "command": " ".join(["python", *sys.argv]),
        "model": {**GPT2, "n_layer": args.layers},
        "results": results,
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()},
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
