"""Command: prepares the rows of token ids that a run reads, ahead of the run."""

from etils import epy

from biomedlm_jax import config as config_lib
from biomedlm_jax.errors import run_command

with epy.lazy_imports():
    from biomedlm_jax import mixture, preparation, rows


def main() -> None:
    """Prepares what `train` with the same configuration would; of a mixture, sees whether its folders fit."""
    config = config_lib.parse_args("prepare", "Make rows of token ids from text, with a tokenizer trained on it.")
    if not config.data.mixture:
        preparation.ensure_prepared(config)
    mixture.check_folders(config)
    for folder in config.prepared_dirs:
        manifest = rows.read_manifest(folder)
        train = manifest["splits"]["train"]
        print(
            f"{folder}: {train['rows']:,} training rows of {manifest['n_positions']} ids "
            f"({train['tokens']:,} tokens), {manifest['splits']['eval']['rows']:,} held-out rows"
        )


if __name__ == "__main__":
    run_command(main)
