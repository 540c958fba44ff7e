"""Between a run's folder and a Hugging Face GPT-2 folder, with the tokenizer.

python -m biomedlm_jax.convert to-hf --checkpoint RUN --output DIR [--step N] [--dtype bfloat16]
python -m biomedlm_jax.convert from-hf --model DIR --output RUN
"""

import argparse

from etils import epy

from biomedlm_jax.errors import run_command

with epy.lazy_imports():
    from biomedlm_jax import exporting, huggingface, model


def _to_hf(args: argparse.Namespace) -> None:
    written = exporting.export(args.checkpoint, args.output, step=args.step, dtype=args.dtype, format=args.format)
    print(
        f"wrote {args.output}: {args.dtype} weights of {_size(written.total_bytes)} in {len(written.files)} file(s); "
        f"load it with transformers.{written.loaded_by}.from_pretrained({args.output!r}"
        + (", trust_remote_code=True)" if written.loaded_by == "AutoModelForMultipleChoice" else ")")
    )


def _from_hf(args: argparse.Namespace) -> None:
    config = huggingface.import_model(args.model, args.output)
    parameters = model.param_count(config)
    print(
        f"wrote {args.output}: float32 weights of {_size(4 * parameters)}, {parameters:,} parameters; load it with "
        f"biomedlm_jax.load_model({args.output!r}), or train from it with --run.init_from {args.output}"
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m biomedlm_jax.convert", description="Convert between a run and a Hugging Face GPT-2 folder."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    to_hf = commands.add_parser(
        "to-hf",
        help="write a checkpoint as a Hugging Face folder",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    to_hf.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of a run")
    to_hf.add_argument("--output", required=True, metavar="DIR", help="folder to make; must be new or empty")
    to_hf.add_argument("--step", type=int, metavar="N", help="which checkpoint; the newest if not given")
    to_hf.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of the tensors; bfloat16 halves the files, float16 is refused if a value overflows",
    )
    to_hf.add_argument(
        "--format",
        choices=("safetensors", "pytorch"),
        default="safetensors",
        help="model.safetensors, or pytorch_model.bin, which needs PyTorch; in shards of 5 GB",
    )
    to_hf.set_defaults(run=_to_hf)
    from_hf = commands.add_parser(
        "from-hf",
        help="make a run's folder from a Hugging Face folder",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    from_hf.add_argument(
        "--model", required=True, metavar="DIR", help="folder with config.json, weights, and the tokenizer's files"
    )
    from_hf.add_argument("--output", required=True, metavar="RUN", help="folder to make; must be new or empty")
    from_hf.set_defaults(run=_from_hf)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
