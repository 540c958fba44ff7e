"""The full training step of configs/biomedlm_2_7b.yaml on one device: ours against PyTorch on the same machine.

    python benchmarks/train_step.py                # on one GPU of 80 GB or more, in under ten minutes
    python benchmarks/train_step.py --small        # a minute on a CPU, in float32: shows that it runs

Writes benchmarks/results/train_step_<device>.json, after each contestant, and a chart beside it; with --fp8
train_step_fp8_<device>.json.

All do the same: a micro-batch of fresh tokens, forward, backward, clipping by the global norm, AdamW with float32
parameters and moments under the run's schedule, no dropout, products in bfloat16, attention scaled by the layer, the
head tied to the embedding, from the same weights. So their losses must agree, and they are reported.

  ours          the step that `biomedlm_jax.train` runs; with --fp8 it is called ours-fp8, and stays out of the
                comparison, because its products are of fewer bits than the others' (its MFU is of bfloat16's peak);
  torch         nanoGPT's way: one module, `torch.compile` of model and loss, the residual stream in bfloat16, SDPA with
                cuDNN's kernel (benchmarks/attention.py found it the faster one), fused AdamW;
  torch-eager   the same without `torch.compile`;
  huggingface   GPT2LMHeadModel under bfloat16 autocast with SDPA and fused AdamW, as transformers' Trainer runs it.

Each case, contestant:micro-batch, runs in a process of its own, one after the other; the machine's own product of two
random 8192 x 8192 bfloat16 matrices (1024 x 1024, float32, with --small) is timed before the first and after the last.
After --warm-up steps, --steps are timed in three groups, each as a run goes: the host waits for the device once, at the
group's end. A step's time is the median of the groups, and half of their range is its spread. Where a case runs twice,
by default ours:24 before and after its rivals, how far its last run is from its first is the drift. MFU counts 6N +
12LdT operations a token (16.57e9 for the published model) and the maker's peak.

The exit status is 1 if a case failed. One that the budget had no time for is skipped, which is no failure.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import attention
import numpy as np
import timing
from timing import Died, TimedOut

from biomedlm_jax.errors import UserError, run_command

CONFIG_FILE = Path(__file__).parents[1] / "configs" / "biomedlm_2_7b.yaml"
# All take over ten minutes where a case of ours takes 73 s and one of torch 101, as on an H200: the last are the least
# telling, and the ones that the budget skips.
CASES = "ours:24,torch:24,ours:32,torch:32,ours:24,huggingface:8,torch:16,ours:16"
SMALL_CASES = "ours:4,torch:4,torch-eager:4,huggingface:4,ours:4"
GROUPS = 3
# Of drift and spread, beyond which times say more of the machine than of the contestants.
MAX_NOISE = 0.1


class Settings(NamedTuple):
    """Of all contestants."""

    warm_up: int
    steps: int
    remat: str
    """Of ours."""
    unroll: int
    """Of ours; 0 is all layers."""
    loss_chunk: int
    """Of ours."""
    profile: str
    """Folder for a profile of ours; empty for none."""
    small: bool
    fp8: bool
    """Of ours, which is then no contestant of the others."""


def benchmark(settings: Settings) -> str:
    """What the report is called: one with FP8 must not take the place of the comparison's."""
    return "train_step_fp8" if settings.fp8 else "train_step"


def configuration(settings: Settings, micro_batch: int) -> Any:
    """The published run on one device, in one part."""
    from biomedlm_jax import config as config_lib

    config = config_lib.load_config(CONFIG_FILE)
    model = dataclasses.replace(
        config.model, remat=settings.remat, unroll=settings.unroll or (4 if settings.small else config.model.n_layer)
    )
    if settings.small:
        model = dataclasses.replace(
            model, n_layer=4, n_embd=256, n_head=4, n_positions=256, vocab_size=4096, compute_dtype="float32"
        )
    if settings.fp8:
        model = dataclasses.replace(model, compute_dtype="bfloat16", fp8=True)
    train = dataclasses.replace(
        config.train,
        global_batch_size=micro_batch,
        gradient_accumulation_steps=1,
        loss_chunk=min(settings.loss_chunk, model.n_positions),
    )
    # Weights in bfloat16 are kept for the backward pass, as PyTorch keeps them.
    mesh = dataclasses.replace(config.mesh, reshard_after_forward=False)
    return dataclasses.replace(config, model=model, train=train, mesh=mesh)


# What all contestants start from and read.


def layer_leaves(model: Any) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and standard deviation of a block's parameters, by Hugging Face's names; 0 for biases, nan for scales."""
    width, std = model.n_embd, model.initializer_range
    residual = std / math.sqrt(2 * model.n_layer)
    leaves: dict[str, tuple[tuple[int, ...], float]] = {}
    for name in ("ln_1", "ln_2"):
        leaves |= {f"{name}.weight": ((width,), math.nan), f"{name}.bias": ((width,), 0)}
    for name, inner, outer, deviation in (
        ("attn.c_attn", width, 3 * width, std),
        ("attn.c_proj", width, width, residual),
        ("mlp.c_fc", width, 4 * width, std),
        ("mlp.c_proj", 4 * width, width, residual),
    ):
        leaves |= {f"{name}.weight": ((inner, outer), deviation), f"{name}.bias": ((outer,), 0)}
    return leaves


def outer_leaves(model: Any) -> dict[str, tuple[tuple[int, ...], float]]:
    """The same of what is not in a block."""
    width, std = model.n_embd, model.initializer_range
    return {
        "wte.weight": ((model.vocab_size, width), std),
        "wpe.weight": ((model.n_positions, width), std),
        "ln_f.weight": ((width,), math.nan),
        "ln_f.bias": ((width,), 0),
    }


def initial(name: str, layer: int, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """A parameter at the start, a function of its name and layer alone."""
    if math.isnan(deviation):
        return np.ones(shape, np.float32)
    if deviation == 0:
        return np.zeros(shape, np.float32)
    rng = np.random.default_rng([zlib.crc32(name.encode()), layer])
    return rng.standard_normal(shape, np.float32) * np.float32(deviation)


def micro_batch_tokens(model: Any, micro_batch: int, step: int) -> np.ndarray:
    """Ids as frequent as words are, 1 / rank, so that there is something to learn; the last one is never drawn."""
    rng = np.random.default_rng([1, step])
    ranks = np.exp(rng.random((micro_batch, model.n_positions)) * math.log(model.vocab_size - 1))
    return (ranks - 1).astype(np.int32)


# Contestants. Each is a generator that yields its row, in a process of its own.


def time_groups(take: Callable[[int], float], steps: int) -> dict[str, Any]:
    """Seconds a step, of `take(count)`, which takes steps, waits for the device and returns the seconds of all."""
    group_seconds = [take(steps // GROUPS) / (steps // GROUPS) for _ in range(GROUPS)]
    return {"seconds": statistics.median(group_seconds), "group_seconds": group_seconds}


def run_ours(settings: Settings, micro_batch: int) -> Iterator[dict[str, Any]]:
    # JAX takes three quarters of a GPU's memory unless told otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    import jax
    import jax.numpy as jnp

    from biomedlm_jax import sharding, step

    config = configuration(settings, micro_batch)
    model = config.model
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    rows = sharding.batch_sharding(mesh)
    mask = np.ones((micro_batch, model.n_positions), bool)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(step.init_state, config))
        shardings = sharding.tree_shardings(mesh, shapes)
        state = step.init_state(config, _params(model))
        assert jax.tree.structure(state) == jax.tree.structure(shapes)
        state = jax.device_put(state, shardings)

        def batch(number: int) -> Any:
            return jax.device_put(step.Batch(micro_batch_tokens(model, micro_batch, number), mask), rows)

        begin = time.perf_counter()
        program = step.jit_train_step(config, shardings, rows).lower(state, batch(0)).compile()
        compile_s = time.perf_counter() - begin
        losses: list[Any] = []

        def take(count: int) -> float:
            nonlocal state
            begin = time.perf_counter()
            for _ in range(count):
                state, values = program(state, batch(len(losses)))
                losses.append(values["train/loss"])
            jax.block_until_ready(state)
            return time.perf_counter() - begin

        take(settings.warm_up)
        times = time_groups(take, settings.steps)
        clocks = timing.clocks()
        stats = jax.local_devices()[0].memory_stats() or {}
        if settings.profile:
            with jax.profiler.trace(settings.profile):
                take(2)
            Path(settings.profile, "step.hlo.txt").write_text(program.as_text())
    analysis = program.memory_analysis()
    yield {
        **times,
        "compile_s": compile_s,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "compiled_bytes": analysis and analysis.argument_size_in_bytes + analysis.temp_size_in_bytes,
        "losses": [float(jnp.asarray(loss)) for loss in losses[: settings.warm_up + settings.steps]],
        "settings": {
            "remat": model.remat,
            "unroll": model.unroll,
            "loss_chunk": config.train.loss_chunk,
            "fp8": model.fp8,
        },
        "clocks": clocks,
    }


def _params(model: Any) -> dict[str, Any]:
    """Our tree of `initial`'s parameters, on the device."""
    import jax.numpy as jnp

    def place(tree: dict[str, Any], name: str, value: Any) -> None:
        *parts, last = name.split(".")
        for part in parts:
            tree = tree.setdefault(part, {})
        leaf = {"bias": "bias", "weight": "scale" if "ln_" in name else "kernel"}[last]
        tree["embedding" if parts[0] in ("wte", "wpe") else leaf] = value

    params: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name, leaf in outer_leaves(model).items():
            place(params, name, jnp.asarray(initial(name, 0, *leaf)))
        for name, leaf in layer_leaves(model).items():
            layers = list(pool.map(lambda i, name=name, leaf=leaf: initial(name, i, *leaf), range(model.n_layer)))
            place(params.setdefault("h", {}), name, jnp.stack(layers))
    return params


def run_torch(name: str, settings: Settings, micro_batch: int) -> Iterator[dict[str, Any]]:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # else fragments take gigabytes
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config = configuration(settings, micro_batch)
    model = config.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    named = dict(_torch_parameters(model, device))
    if name == "huggingface":
        loss_of, parameters = _huggingface(model, named, device)
    else:
        loss_of, parameters = _nano(model, named, device)
        if name == "torch":
            # One shape, thirty-two layers of different constants: inductor sees all of them at once, as in nanoGPT.
            loss_of = torch.compile(loss_of, dynamic=False)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay / config.optimizer.learning_rate,
        fused=True,
    )
    losses: list[Any] = []

    def take(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            tokens = torch.from_numpy(micro_batch_tokens(model, micro_batch, len(losses)).astype(np.int64))
            loss = loss_of(tokens.to(device, non_blocking=True))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
            warm_up = min(1.0, len(losses) / config.optimizer.warmup_steps)  # the cosine has not begun
            optimizer.param_groups[0]["lr"] = config.optimizer.learning_rate * warm_up
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    backend = SDPBackend.CUDNN_ATTENTION if device == "cuda" else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel([backend, SDPBackend.MATH], set_priority=True):
        first = take(1)
        take(settings.warm_up - 1)
        times = time_groups(take, settings.steps)
    yield {
        **times,
        "compile_s": first - times["seconds"],
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "losses": [float(loss) for loss in losses],
        "clocks": timing.clocks(),
    }


def _torch_parameters(model: Any, device: str) -> Iterator[tuple[str, Any]]:
    """`initial`'s parameters by Hugging Face's names, matrices [in, out]."""
    import torch

    named = {f"transformer.{name}": (name, 0, *leaf) for name, leaf in outer_leaves(model).items()}
    for i in range(model.n_layer):
        named |= {f"transformer.h.{i}.{name}": (name, i, *leaf) for name, leaf in layer_leaves(model).items()}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name, value in zip(named, pool.map(lambda leaf: initial(*leaf), named.values()), strict=True):
            yield name, torch.from_numpy(value).to(device)


def _nano(model: Any, named: dict[str, Any], device: str) -> tuple[Any, list[Any]]:
    """The loss of tokens, and the parameters that it depends on."""
    import torch
    import torch.nn.functional as F

    dtype = getattr(torch, model.compute_dtype)
    # torch.nn.Linear's layout.
    params = {
        name: torch.nn.Parameter(value.T.contiguous() if ".c_" in name and value.ndim == 2 else value)
        for name, value in named.items()
    }
    width, heads, eps = model.n_embd, model.n_head, model.layer_norm_epsilon

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, params[f"{name}.weight"].to(dtype), params[f"{name}.bias"].to(dtype))

    def norm(x: Any, name: str) -> Any:
        scale, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        return F.layer_norm(x.float(), (width,), scale, bias, eps).to(dtype)

    def loss_of(tokens: Any) -> Any:
        batch, seq = tokens.shape
        positions = torch.arange(seq, device=tokens.device)
        wte = params["transformer.wte.weight"]
        x = (F.embedding(tokens, wte) + F.embedding(positions, params["transformer.wpe.weight"])).to(dtype)
        for i in range(model.n_layer):
            block = f"transformer.h.{i}"
            qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
            q, k, v = (y.view(batch, seq, heads, width // heads).transpose(1, 2) for y in qkv.split(width, dim=2))
            scale = 1 / math.sqrt(width // heads) / ((i + 1) if model.scale_attn_by_inverse_layer_idx else 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            x = x + linear(y.transpose(1, 2).reshape(batch, seq, width), f"{block}.attn.c_proj")
            y = F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), approximate="tanh")
            x = x + linear(y, f"{block}.mlp.c_proj")
        x = norm(x, "transformer.ln_f")
        logits = F.linear(x[:, :-1], wte.to(dtype))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return loss_of, list(params.values())


def _huggingface(model: Any, named: dict[str, Any], device: str) -> tuple[Any, list[Any]]:
    import torch
    import transformers

    config = transformers.GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.n_positions,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        layer_norm_epsilon=model.layer_norm_epsilon,
        scale_attn_by_inverse_layer_idx=model.scale_attn_by_inverse_layer_idx,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    gpt2 = gpt2.to_empty(device=device)
    gpt2.tie_weights()
    state = {name: value for name, value in gpt2.state_dict().items() if name in named}
    assert state.keys() == named.keys(), named.keys() ^ state.keys()
    for name, value in state.items():
        value.copy_(named.pop(name))
    gpt2.train()
    autocast = functools.partial(
        torch.autocast, device, dtype=torch.bfloat16, enabled=model.compute_dtype == "bfloat16"
    )

    def loss_of(tokens: Any) -> Any:
        with autocast():
            return gpt2(tokens, labels=tokens).loss

    return loss_of, list(gpt2.parameters())


# The driver.


def run(cases: list[tuple[str, int]], settings: Settings, out: Path, budget_s: float, limit_s: float) -> dict[str, Any]:
    """All cases; the report, which is also written to `out`."""
    from biomedlm_jax import model as model_lib
    from biomedlm_jax import targets

    end = time.monotonic() + budget_s
    device = timing.query_gpu("name").get("name") or list(attention._in_new_process(timing.device_kind, limit_s=60))[0]
    path = timing.report_file(out, benchmark(settings), device)
    chip, config = targets.chip_of(device), configuration(settings, 1)
    report: dict[str, Any] = {
        **timing.machine(device),
        "protocol": {**settings._asdict(), "flops_per_token": model_lib.flops_per_token(config.model)},
        "peak_flops": chip and chip.peak_flops,
        "matmul": [],
        "rows": [],
    }

    def matmul() -> None:
        product = (1024, timing.SMALL_LOOP, "float32") if settings.small else (8192, timing.LOOP, "bfloat16")
        try:
            report["matmul"] += attention._in_new_process(attention.run_matmul, *product, limit_s=60)
        except (Died, RuntimeError) as error:
            report["matmul"].append({"reason": str(error)})

    matmul()
    for name, micro_batch in cases:
        contestant = "ours-fp8" if settings.fp8 and name == "ours" else name
        row: dict[str, Any] = {"contestant": contestant, "micro_batch": micro_batch, "clocks_before": timing.clocks()}
        left = min(limit_s, end - time.monotonic() - 15)
        begin = time.monotonic()
        if left < 30:
            row |= {"status": "skipped", "reason": f"of the {budget_s:.0f} s too few were left"}
        else:
            function = run_ours if name == "ours" else functools.partial(run_torch, name)
            try:
                [found] = attention._in_new_process(function, settings, micro_batch, limit_s=left)
                row |= {"status": "ok", **found}
            except (Died, RuntimeError) as error:
                row |= {"status": "timed out" if isinstance(error, TimedOut) else "failed", "reason": str(error)}
                if isinstance(error, TimedOut) and left < limit_s:  # by the budget, not by its own limit
                    row |= {"status": "skipped", "reason": f"{error}, as the {budget_s:.0f} s were over"}
        row["wall_s"] = round(time.monotonic() - begin, 1)
        report["rows"].append(row)
        derive(report, config.model.n_positions)
        timing.write_report(path, report)
        print(line(row), file=sys.stderr, flush=True)
    matmul()
    derive(report, config.model.n_positions)
    timing.write_report(path, report)
    return report


def derive(report: dict[str, Any], n_positions: int) -> None:
    """Fills in what follows from the seconds of a step."""
    matmul = [found["tflops"] * 1e12 for found in report["matmul"] if "tflops" in found]
    runs: dict[tuple[str, int], list[float]] = {}
    for row in report["rows"]:
        if row["status"] == "ok":
            row["spread"] = (max(row["group_seconds"]) - min(row["group_seconds"])) / 2 / row["seconds"]
            row["tokens_per_second"] = row["micro_batch"] * n_positions / row["seconds"]
            flops = row["tokens_per_second"] * report["protocol"]["flops_per_token"]
            row["mfu"] = report["peak_flops"] and flops / report["peak_flops"]
            row["ratio_to_matmul"] = flops / max(matmul) if matmul else None
            row["loss_first"], row["loss_last"] = row["losses"][0], row["losses"][-1]
            runs.setdefault((row["contestant"], row["micro_batch"]), []).append(row["tokens_per_second"])
    report["drift"] = max((abs(found[-1] / found[0] - 1) for found in runs.values() if len(found) > 1), default=None)
    # Who runs twice must not have the better of two draws.
    best = {
        side: max((statistics.median(found) for (name, _), found in runs.items() if match(name)), default=None)
        for side, match in _SIDES.items()
    }
    report["ratio_to_pytorch"] = best["ours"] / best["pytorch"] if best["ours"] and best["pytorch"] else None


_SIDES: dict[str, Callable[[str], bool]] = {
    "ours": lambda name: name == "ours",
    "pytorch": lambda name: not name.startswith("ours"),
}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['contestant']:>12} {row['micro_batch']:>5}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    parts = [f"{head} {row['seconds'] * 1e3:8.1f} ms (+-{row['spread']:5.1%})"]
    parts += [f"{row['tokens_per_second']:9,.0f} tokens/s"]
    parts += [f"{row['mfu']:6.1%} MFU"] if row["mfu"] else []
    parts += [f"{row['ratio_to_matmul']:6.1%} of the product"] if row["ratio_to_matmul"] else []
    parts += [f"{row['peak_bytes'] / 1e9:6.1f} GB"] if row["peak_bytes"] else []
    parts += [f"compile {row['compile_s']:5.1f} s", f"loss {row['loss_first']:.4f} -> {row['loss_last']:.4f}"]
    return " ".join(parts)


def table(report: dict[str, Any]) -> str:
    products = ", ".join(f"{found.get('tflops', math.nan):.3g}" for found in report["matmul"])
    lines = [f"{report['device']}, product of matrices before and after: {products} TFLOP/s"]
    lines += map(line, report["rows"])
    if report["drift"] is not None:
        lines.append(f"drift between the first and the last run of a case: at most {report['drift']:.1%}")
    if report["ratio_to_pytorch"] is not None:
        lines.append(f"the best of ours is {report['ratio_to_pytorch']:.2f}x the best of PyTorch")
        compared = (row for row in report["rows"] if any(match(row["contestant"]) for match in _SIDES.values()))
        noise = [report["drift"] or 0.0, *(row["spread"] for row in compared if row["status"] == "ok")]
        if max(noise) > MAX_NOISE:
            lines.append(f"the machine was busy, with a drift or spread of {max(noise):.0%}: do not trust the ratio")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of tokens/s, a bar a case."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["status"] == "ok"]
    figure = Figure(figsize=(8, 0.6 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['contestant']}, {row['micro_batch']} sequences" for row in rows]
    bars = axes.barh(
        range(len(rows)),  # by their labels, equal cases would share a bar
        [row["tokens_per_second"] for row in rows],
        color=["#0072B2" if row["contestant"].startswith("ours") else "#BBBBBB" for row in rows],
        tick_label=labels,
    )
    texts = [f"{row['tokens_per_second']:,.0f}" + (f" ({row['mfu']:.1%} MFU)" if row["mfu"] else "") for row in rows]
    axes.bar_label(bars, texts, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(xlabel="tokens/s", title=f"A training step on {report['device']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def check_folder(folder: Path) -> None:
    """Before the work, whose report it shall hold. Raises: UserError: no file can be made in it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"--out {folder} cannot be used, as {there} is no folder that can be written to")


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", help=f"contestant:micro-batch,...; by default {CASES}")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    add("--warm-up", type=int, default=6, help="steps before the clock starts")
    add("--steps", type=int, default=15, help=f"timed steps, a multiple of {GROUPS}")
    add("--remat", default="none", choices=("none", "matmuls", "full"), help="of ours")
    add("--unroll", type=int, default=0, help="layers in a turn of the loop, of ours; 0 is all")
    add("--loss-chunk", type=int, default=0, help="of ours")
    add("--profile", default="", metavar="DIR", help="write a profile of two steps of ours here, and the program")
    add("--budget-s", type=float, default=560, help="seconds after which nothing new begins")
    add("--limit-s", type=float, default=180, help="seconds that one case may take")
    add("--small", action="store_true", help="a small model in float32, on any machine")
    add("--fp8", action="store_true", help="ours with model.fp8, which is not compared with the others")
    args = parser.parse_args()
    cases = []
    for case in (args.cases or (SMALL_CASES if args.small else CASES)).split(","):
        name, _, micro_batch = case.partition(":")
        known = name in ("ours", "torch", "torch-eager", "huggingface")
        if not known or not micro_batch.isdecimal() or int(micro_batch) < 1:
            parser.error(f"a case is contestant:micro-batch, not {case}")
        cases.append((name, int(micro_batch)))
    if args.warm_up < 1:
        parser.error(f"--warm-up must be at least 1, not {args.warm_up}: the first step of PyTorch's compiles it")
    if args.steps < GROUPS or args.steps % GROUPS:
        parser.error(f"--steps must be a multiple of {GROUPS}, not {args.steps}: they are timed in as many groups")
    settings = Settings(
        args.warm_up, args.steps, args.remat, args.unroll, args.loss_chunk, args.profile, args.small, args.fp8
    )
    configuration(settings, 1)  # refuses what cannot be
    check_folder(args.out)
    report = run(cases, settings, args.out, args.budget_s, args.limit_s)
    print(table(report))
    device = report["device"]
    if any(row["status"] == "ok" for row in report["rows"]):
        draw(report, timing.report_file(args.out, benchmark(settings), device).with_suffix(".png"))
    return int(any(row["status"] not in ("ok", "skipped") for row in report["rows"]))


if __name__ == "__main__":
    run_command(main)
