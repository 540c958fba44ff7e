"""Options of commands that read text: what to keep of it."""

import argparse
from typing import Any

from etils import epy

from biomedlm_jax.config import DataConfig

with epy.lazy_imports():
    from biomedlm_jax import corpus


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `selection` reads."""
    default = DataConfig()
    parser.add_argument(
        "--pile-sets",
        nargs="*",
        default=default.pile_sets,
        metavar="SET",
        help="The Pile's sets to keep, of JSON lines and Parquet; none keeps every record, also without that name",
    )
    parser.add_argument(
        "--text-field", default=default.text_field, metavar="NAME", help="of the text, in JSON lines and Parquet"
    )
    parser.add_argument(
        "--languages",
        nargs="*",
        default=default.languages,
        metavar="CODE",
        help="of PubMed XML and JATS to keep, in NLM's codes; none keeps all",
    )


def selection(args: argparse.Namespace) -> Any:
    """The `corpus.Selection` that a command line asks for."""
    return corpus.Selection(tuple(args.pile_sets), args.text_field, tuple(args.languages))
