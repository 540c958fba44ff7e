"""Text generation: ours beside transformers' `generate` with its cache, on the same weights and prompts.

    python benchmarks/generate.py            # the published model in bfloat16 on a GPU, in under ten minutes
    python benchmarks/generate.py --small    # GPT-2 small in float32, on a CPU

Writes benchmarks/results/generate_<device>.json, and a chart beside it. For each batch size, both continue the same
random prompts greedily by --new-tokens, of which none ends a text; each in a process of its own that holds its weights,
in turns, --repeats times, and medians are taken. "prefill" is a call that makes one token, counted in tokens of
the prompts; "decode" is what the others take more than it, counted in tokens made. Both sides are given as many calls
as they like to warm up. The tokens should agree in float32. "of_bandwidth", on a known GPU: the bytes of weights and
cache that a step of decoding must read, over what the memory gives in its time by the maker's word.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timing

from biomedlm_jax import targets

CONTESTANTS = ("ours", "transformers")


class Settings(NamedTuple):
    prompt: int
    new: int
    batches: tuple[int, ...]
    small: bool
    seed: int = 0


def sizes(small: bool) -> dict[str, Any]:
    """Of configs/pubmed_124m.yaml, or of the published model."""
    if small:
        return {"vocab_size": 28_896, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    return {"vocab_size": 28_896, "n_positions": 1024, "n_embd": 2560, "n_layer": 32, "n_head": 20}


def prompts(settings: Settings, batch: int) -> np.ndarray:
    rng = np.random.default_rng(settings.seed)
    return rng.integers(0, sizes(settings.small)["vocab_size"], (batch, settings.prompt))


@functools.cache
def ours(settings: Settings) -> Any:
    """A function from prompts and a number of tokens to tokens."""
    import jax

    from biomedlm_jax import decoding, generation, model
    from biomedlm_jax.config import ModelConfig
    from biomedlm_jax.generation_config import GenerationConfig

    config = ModelConfig(**sizes(settings.small), compute_dtype="float32" if settings.small else "bfloat16")
    # Both sides draw the same weights from the seed.
    params = jax.jit(lambda: model.init_params(config, settings.seed))()
    weights = jax.jit(functools.partial(decoding.lay_out, config))(params)
    del params

    def generate(ids: np.ndarray, new: int) -> np.ndarray:
        made = generation.generate(config, weights, ids.tolist(), GenerationConfig(max_new_tokens=new), eos_id=-1)
        return np.array([row.tokens for row in made])

    return generate


@functools.cache
def transformers(settings: Settings) -> Any:
    """The same of transformers, with the same weights."""
    import jax
    import torch
    from flax import traverse_util
    from transformers import GPT2Config, GPT2LMHeadModel

    from biomedlm_jax import huggingface, model
    from biomedlm_jax.config import ModelConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    made = GPT2LMHeadModel(GPT2Config(**sizes(settings.small), **ids, scale_attn_by_inverse_layer_idx=True)).eval()
    config = ModelConfig(**sizes(settings.small))
    params = traverse_util.flatten_dict(jax.jit(lambda: model.init_params(config, settings.seed))(), sep="/")
    state = made.transformer.state_dict()
    for tensor in huggingface.tensors(config):
        state[tensor.name].copy_(torch.from_numpy(np.array(tensor.of(params))))
    del params
    made = made.to(device, torch.float32 if settings.small else torch.bfloat16)

    def generate(ids: np.ndarray, new: int) -> np.ndarray:
        inputs = torch.from_numpy(ids).to(device)
        with torch.inference_mode():
            out = made.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        return out[:, ids.shape[1] :].cpu().numpy()

    return generate


def measure(contestant: str, settings: Settings, batch: int, calls: int) -> Iterator[dict[str, Any]]:
    """Seconds of calls that make one token and all of them, and what they made."""
    generate = {"ours": ours, "transformers": transformers}[contestant](settings)
    ids = prompts(settings, batch)
    seconds: dict[int, list[float]] = {1: [], settings.new: []}
    for _ in range(calls):
        for new, taken in seconds.items():
            begin = time.perf_counter()
            tokens = generate(ids, new)
            taken.append(time.perf_counter() - begin)
    yield {"one": seconds[1], "all": seconds[settings.new], "tokens": tokens.tolist()}


def run(settings: Settings, repeats: int, out: Path, limit_s: float) -> dict[str, Any]:
    workers = {name: timing.Worker() for name in CONTESTANTS}
    device = timing.Worker()
    kind = device.call(timing.device_kind, limit_s=60)
    device.close()
    report = timing.machine(kind) | {"protocol": settings._asdict() | {"repeats": repeats} | sizes(settings.small)}
    report["rows"] = []
    bandwidth = next((chip.hbm_bandwidth for chip in targets.CHIPS.values() if chip.kind == kind), None)
    path = timing.report_file(out, "generate", kind)
    for batch in settings.batches:
        times: dict[str, dict[str, list[float]]] = {name: {"one": [], "all": []} for name in CONTESTANTS}
        tokens = {}
        for name in CONTESTANTS:
            workers[name].call(measure, name, settings, batch, 2, limit_s=limit_s)  # compiles, and warms up
        for _ in range(repeats):
            for name in CONTESTANTS:
                found = workers[name].call(measure, name, settings, batch, 1, limit_s=limit_s)
                tokens[name] = found.pop("tokens")
                for what, values in found.items():
                    times[name][what] += values
        report["rows"].append(row(settings, batch, times, tokens, bandwidth))
        timing.write_report(path, report)
        print(line(report["rows"][-1]), file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    return report


def step_bytes(settings: Settings, batch: int) -> float:
    """What a step of decoding must read: all weights but the positions' once, and the cache at its mean length."""
    size = sizes(settings.small)
    width, layers, itemsize = size["n_embd"], size["n_layer"], 4 if settings.small else 2
    weights = layers * 12 * width**2 + size["vocab_size"] * width
    cache = 2 * layers * batch * width * (settings.prompt + settings.new / 2)
    return itemsize * (weights + cache)


def row(
    settings: Settings, batch: int, times: dict[str, Any], tokens: dict[str, Any], bandwidth: float | None
) -> dict[str, Any]:
    """Tokens a second of both, and their ratio: the median of those of turns side by side."""
    found: dict[str, Any] = {"batch": batch, "seconds": times}
    rates = {}
    for name in CONTESTANTS:
        one, whole = np.array(times[name]["one"]), np.array(times[name]["all"])
        rates[name] = {
            "prefill": batch * settings.prompt / one,
            "decode": batch * (settings.new - 1) / (whole - one),
            "generate": batch * settings.new / whole,
        }
        found[name] = {what: statistics.median(rate) for what, rate in rates[name].items()}
    for what in ("prefill", "decode", "generate"):
        ratios = rates["ours"][what] / rates["transformers"][what]
        found[f"{what}_ratio"] = statistics.median(ratios)
        found[f"{what}_ratio_range"] = [min(ratios), max(ratios)]
    found["of_bandwidth"] = {
        name: bandwidth and step_bytes(settings, batch) * found[name]["decode"] / batch / bandwidth
        for name in CONTESTANTS
    }
    same = np.array(tokens["ours"]) == np.array(tokens["transformers"])
    return found | {"equal_tokens": float(same.mean())}


def line(found: dict[str, Any]) -> str:
    parts = [
        f"{what} {found['ours'][what]:,.0f} against {found['transformers'][what]:,.0f} tokens/s ({ratio:.2f}x)"
        for what in ("prefill", "decode", "generate")
        for ratio in [found[f"{what}_ratio"]]
    ]
    return f"batch {found['batch']:3}: {', '.join(parts)}; {found['equal_tokens']:.1%} of the tokens equal"


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of tokens/s by batch, prefill and decode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(f"Generation on {report['device']}, tokens/s")
    for axes, what in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        places = np.arange(len(report["rows"]))
        for shift, name, color in ((-0.2, "ours", "#0072B2"), (0.2, "transformers", "#BBBBBB")):
            bars = axes.bar(places + shift, [row[name][what] for row in report["rows"]], 0.4, label=name, color=color)
            axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axes.set_xticks(places, [f"batch {row['batch']}" for row in report["rows"]])
        axes.set_title(what)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    add("--batches", default="1,8,32", help="prompts at once")
    add("--prompt-tokens", type=int, default=128, help="tokens of each prompt")
    add("--new-tokens", type=int, default=64, help="tokens made of each")
    add("--repeats", type=int, default=5, help="turns of each side")
    add("--limit-s", type=float, default=300, help="seconds that one turn may take")
    add("--small", action="store_true", help="GPT-2 small in float32")
    args = parser.parse_args()
    # Both sides hold their weights at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    batches = tuple(map(int, args.batches.split(",")))
    settings = Settings(args.prompt_tokens, args.new_tokens, batches, args.small)
    report = run(settings, args.repeats, args.out, args.limit_s)
    draw(report, timing.report_file(args.out, "generate", report["device"]).with_suffix(".png"))


if __name__ == "__main__":
    main()
