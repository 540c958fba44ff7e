"""From text to rows and from rows to batches, beside Hugging Face's datasets and tokenizers, and NumPy's memmap.

    pip install datasets && python benchmarks/data.py     # ten minutes on two cores
    python benchmarks/data.py --small                     # a minute, on little text: shows that it runs

Writes benchmarks/results/data_<device>.json and a chart beside it.

Preparation. Both sides do the same to the same files, The Pile's JSON lines under zstd: keep the PubMed sets, drop
exact duplicates, encode with the same tokenizer (ours as prepare loads it, theirs as `tokenizer export` wrote it), end
each document with <|endoftext|>, cut into rows of 1,024 ids, write them. Theirs is what Hugging Face's own examples of
language modelling do: `load_dataset`, `filter`, `map` in batches, `save_to_disk`, with as many processes.

The text is made of the sentences of real documents (--text) in another order, so that there is enough of it, and 5 %
of its words are made new, as 5.7 % of those in the last of the four files in shared/data/pile/train are that are not in
the others: there a cache of words does not help. (In more text fewer words are new.) Without --text it is synthetic.

Reading. Batches of 32 rows of those just prepared, as `train` takes them, to the arrays that a step takes; theirs are
rows of a memory-mapped file of the same ids drawn at random, as in nanoGPT. All of it fits into the page cache.

Each run is a process of its own; runs of both sides alternate, and the numbers are medians of --rounds.
"""

import argparse
import dataclasses
import io
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timing

N_POSITIONS = 1024
BATCH_SIZE = 32
NEW_WORDS = 0.05
JUMP_STEP = 280_000
TOKENS_PER_SECOND = 40_000
"""Of the training step whose wait for the loader is measured."""


# ---- The text


def make_text(sources: list[str], folder: Path, size: int, files: int) -> int:
    """Writes `files` shards with about `size` bytes of text in all, one document in 20 twice; the bytes of text."""
    import zstandard

    rng = random.Random(0)
    documents = list(_documents(sources))
    sentences = [sentence for text in documents for sentence in re.split(r"(?<=[.\n]) ?", text) if sentence]
    lengths = [len(text) for text in documents]
    written, last = 0, ""
    for number in range(files):
        with zstandard.open(folder / f"{number:02}.jsonl.zst", "wt", encoding="utf-8") as file:
            while written < size * (number + 1) // files:
                length, words = rng.choice(lengths), []
                while length > 0:
                    sentence = rng.choice(sentences)
                    length -= len(sentence)
                    words += [_new(word, rng) if rng.random() < NEW_WORDS else word for word in sentence.split(" ")]
                last = last if last and rng.random() < 0.05 else " ".join(words)
                name = rng.choice(["PubMed Abstracts", "PubMed Central"])
                file.write(json.dumps({"text": last, "meta": {"pile_set_name": name}}) + "\n")
                written += len(last.encode())
    return written


def _documents(sources: list[str]) -> Iterator[str]:
    from biomedlm_jax import corpus, synthetic

    if sources:
        files = corpus.expand_globs(sources)
        yield from (document.text for document in corpus.read_mixed(files, corpus.ReadReport()))
    else:
        yield from (synthetic.generate(index).text for index in range(5000))


def _new(word: str, rng: random.Random) -> str:
    place = rng.randrange(len(word) + 1)
    return word[:place] + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3)) + word[place:]


# ---- Preparation: functions that run in a process of their own and return what they counted


def prepare_ours(folder: Path, processes: int) -> dict[str, Any]:
    from biomedlm_jax import preparation, rows

    config = _config(folder)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, dir=str(folder / f"ours{processes}"), processes=processes)
    )
    preparation.ensure_prepared(config)
    counts = rows.read_manifest(config.prepared_dir)["splits"]["train"]
    return {name: counts[name] for name in ("documents", "rows", "tokens")}


def _config(folder: Path) -> Any:
    from biomedlm_jax.config import Config, DataConfig, ModelConfig
    from biomedlm_jax.tokenizer import load_tokenizer

    vocab_size = load_tokenizer(folder / "tokenizer").vocab_size
    return Config(
        model=ModelConfig(vocab_size=vocab_size, n_positions=N_POSITIONS),
        data=DataConfig(
            source="pile",
            train_files=str(folder / "text" / "*.zst"),
            tokenizer=str(folder / "tokenizer"),
            dir=str(folder / "ours1"),
        ),
    )


def prepare_theirs(folder: Path, processes: int) -> dict[str, Any]:
    import hashlib

    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer_hf" / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")
    text = datasets.load_dataset(
        "json",
        data_files=sorted(map(str, (folder / "text").glob("*.zst"))),
        split="train",
        cache_dir=str(folder / f"cache{processes}"),
        num_proc=processes,
    )
    sets = {"PubMed Abstracts", "PubMed Central"}
    text = text.filter(lambda record: record["meta"]["pile_set_name"] in sets, num_proc=processes)
    hashes = text.map(
        lambda batch: {"hash": [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in batch["text"]]},
        batched=True,
        num_proc=processes,
        remove_columns=text.column_names,
    )["hash"]
    seen: set[bytes] = set()
    first = [index for index, value in enumerate(hashes) if not (value in seen or seen.add(value))]  # type: ignore[func-returns-value]
    text = text.select(first)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[*document.ids, eos] for document in encoded]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = [token for document in batch["ids"] for token in document]
        end = len(ids) // N_POSITIONS * N_POSITIONS
        return {"tokens": [ids[start : start + N_POSITIONS] for start in range(0, end, N_POSITIONS)]}

    encoded = text.map(encode, batched=True, num_proc=processes, remove_columns=text.column_names)
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"))})
    rows = encoded.map(group, batched=True, num_proc=processes, remove_columns=["ids"], features=features)
    rows.save_to_disk(str(folder / f"theirs{processes}"), num_proc=processes)
    return {"documents": len(text), "rows": len(rows), "tokens": len(rows) * N_POSITIONS}


# ---- Formats of text


def write_formats(documents: list[str], folder: Path) -> None:
    """The same documents in each format, 16 times what `documents` holds."""
    import gzip
    import tarfile
    from xml.sax.saxutils import escape

    import pyarrow
    import pyarrow.parquet
    import zstandard

    folder.mkdir()
    documents = [re.sub(r"[^\x20-\U0010FFFF]", " ", text) for text in documents] * 16
    for name, pile_set in (("pile", "PubMed Abstracts"), ("pile_other_sets", "Github")):
        with zstandard.open(folder / f"{name}.jsonl.zst", "wt", encoding="utf-8") as file:
            for text in documents:
                file.write(json.dumps({"text": text, "meta": {"pile_set_name": pile_set}}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / "parquet.parquet", compression="zstd")
    with gzip.open(folder / "pubmed_xml.xml.gz", "wt", 6, encoding="utf-8") as file:
        file.write("<PubmedArticleSet>\n")
        for number, text in enumerate(documents, 1):
            # Of a record of PubMed about a third is text.
            file.write(
                f'<PubmedArticle><MedlineCitation><PMID Version="1">{number}</PMID><Article><ArticleTitle>A title'
                f"</ArticleTitle><Abstract><AbstractText>{escape(text)}</AbstractText></Abstract><Language>eng</Language>"
                "</Article>"
                + "".join(
                    f"<MeshHeading><DescriptorName>{n:030}</DescriptorName></MeshHeading>"
                    for n in range(len(text) // 45)
                )
                + "</MedlineCitation></PubmedArticle>\n"
            )
        file.write("</PubmedArticleSet>")
    with tarfile.open(folder / "jats_xml.tar.gz", "w:gz", compresslevel=6) as archive:
        for number, text in enumerate(documents):
            paragraphs = "".join(f"<p>{escape(text[at : at + 800])}</p>" for at in range(0, len(text), 800))
            content = f"<article><body><sec><title>T</title>{paragraphs}</sec></body></article>".encode()
            member = tarfile.TarInfo(f"PMC{number}.xml")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def read_formats(folder: Path, _: int) -> dict[str, Any]:
    """MB a second of text, or for other sets of the text that is skipped; and of the files."""
    from biomedlm_jax import corpus

    found: dict[str, Any] = {}
    for path in sorted((folder / "formats").iterdir()):
        name = path.name.split(".")[0]
        report = corpus.ReadReport()
        selection = corpus.Selection(pile_sets=corpus.PUBMED_SETS if "pile" in name else (), languages=("eng",))
        begin = time.perf_counter()
        for _document in corpus.read_documents(name.removesuffix("_other_sets"), [str(path)], report, selection):
            pass
        seconds = time.perf_counter() - begin
        text_bytes = report.bytes or path.stat().st_size * found["pile"]["text_bytes"] / found["pile"]["file_bytes"]
        found[name] = {
            "text_bytes": int(text_bytes),
            "file_bytes": path.stat().st_size,
            "text_mb_per_s": round(text_bytes / 1e6 / seconds, 1),
        }
    return found


# ---- Reading


def read_ours(folder: Path, tokens: int) -> dict[str, Any]:
    batches = _our_batches(folder, 0)
    return _read(lambda: next(batches).tokens, tokens)


def read_theirs(folder: Path, tokens: int) -> dict[str, Any]:
    import jax
    import numpy as np

    ids = np.memmap(folder / "ids.bin", np.uint16, "r")
    rng = np.random.default_rng(0)

    def batch() -> Any:
        starts = rng.integers(0, len(ids) - N_POSITIONS, BATCH_SIZE)
        return jax.device_put(np.stack([ids[start : start + N_POSITIONS].astype(np.int32) for start in starts]))

    return _read(batch, tokens)


def _our_batches(folder: Path, start_step: int) -> Iterator[Any]:
    import jax

    from biomedlm_jax import data, rows, sharding
    from biomedlm_jax.config import DataConfig, MeshConfig

    opened = rows.open_rows(folder / "ours1", "train")
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    threads = DataConfig().reader_threads
    steps = (start_step, start_step + 1_000_000)
    return data.train_batches(opened, 0, BATCH_SIZE, *steps, sharding.batch_sharding(mesh), threads)


def _read(batch: Any, tokens: int) -> dict[str, Any]:
    batch().block_until_ready()
    count = -(-tokens // (BATCH_SIZE * N_POSITIONS))
    begin = time.perf_counter()
    for _ in range(count):
        last = batch()
    last.block_until_ready()
    return {"tokens_per_s": count * BATCH_SIZE * N_POSITIONS / (time.perf_counter() - begin)}


def jump(folder: Path, _: int) -> dict[str, Any]:
    """From opening the rows to the first batch of a late step; imports are made before."""
    import jax

    import biomedlm_jax.data  # noqa: F401

    jax.device_put(0).block_until_ready()
    begin = time.perf_counter()
    next(_our_batches(folder, JUMP_STEP)).tokens.block_until_ready()
    return {"first_batch_s": time.perf_counter() - begin}


def wait(folder: Path, steps: int) -> dict[str, Any]:
    """How long steps wait for their batch; they take as long as those of a GPU at TOKENS_PER_SECOND, and idle here."""
    batches = _our_batches(folder, 0)
    next(batches).tokens.block_until_ready()
    step_s = BATCH_SIZE * N_POSITIONS / TOKENS_PER_SECOND
    waited = 0.0
    for _ in range(steps):
        time.sleep(step_s)
        begin = time.perf_counter()
        next(batches).tokens.block_until_ready()
        waited += time.perf_counter() - begin
    return {"step_s": step_s, "wait_fraction": waited / (steps * step_s)}


STAGES = {
    function.__name__: function
    for function in (prepare_ours, prepare_theirs, read_formats, read_ours, read_theirs, jump, wait)
}


def run_stage(stage: str, folder: Path, number: int) -> dict[str, Any]:
    """A function of this file in a process of its own: what it returns, with its seconds and its memory."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--stage", stage, str(folder), str(number)]
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - begin
    result = {**json.loads(done.stdout.splitlines()[-1]), "seconds": round(seconds, 2)}
    print(stage, number, result, file=sys.stderr)
    return result


def serve_stage(stage: str, folder: str, number: str) -> None:
    result = STAGES[stage](Path(folder), int(number))
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result["cpu_s"] = round(sum(usage.ru_utime + usage.ru_stime for usage in usages), 2)
    result["peak_bytes"] = peak_bytes()
    print(json.dumps(result))


def peak_bytes() -> int | None:
    """Of this process alone, since it began: getrusage counts what its parent had."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 if status.exists() else None  # type: ignore[index]


# ---- The report


def measure(folder: Path, size: int, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Makes the inputs in `folder`, and yields parts of the report as they become known."""
    from biomedlm_jax import corpus, rows, tokenizer

    (folder / "text").mkdir()
    text_bytes = make_text(args.text, folder / "text", size, args.files)
    yield "text", {"bytes": text_bytes, "files": args.files, "from": args.text or "synthetic", "new_words": NEW_WORDS}
    files = corpus.expand_globs([str(folder / "text" / "*")])[: 1 + args.files // 4]
    texts = (document.text for document in corpus.read_documents("pile", files, corpus.ReadReport()))
    trained = tokenizer.train_tokenizer(texts, 28_896, folder / "tokenizer")
    tokenizer.export_tokenizer(trained, folder / "tokenizer_hf")

    contestants = ["prepare_ours"]
    try:
        import datasets  # noqa: F401

        contestants.append("prepare_theirs")
    except ImportError:
        print("datasets is not installed: theirs is left out", file=sys.stderr)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for stage in contestants:
            for processes in args.processes:
                made = [f"ours{processes}"] if stage == "prepare_ours" else [f"theirs{processes}", f"cache{processes}"]
                subprocess.run(["rm", "-rf", *made], cwd=folder, check=True)
                runs.setdefault(f"{stage}_{processes}", []).append(run_stage(stage, folder, processes))
    yield (
        "prepare",
        {
            name: {
                "mb_per_s_a_core": round(text_bytes / 1e6 / _median(found, "seconds") / int(name.rsplit("_", 1)[1]), 3),
                "runs": found,
            }
            for name, found in runs.items()
        },
    )

    write_formats(list(_documents(args.text)), folder / "formats")
    yield "formats", run_stage("read_formats", folder, 0)

    opened = rows.open_rows(folder / "ours1", "train")
    assert opened
    with (folder / "ids.bin").open("wb") as file:
        for index in range(len(opened)):
            file.write(opened.source[index]["tokens"].tobytes())
    runs = {}
    for _ in range(args.rounds):
        for stage, number in (
            ("read_ours", args.read_tokens),
            ("read_theirs", args.read_tokens),
            ("jump", 0),
            ("wait", args.steps),
        ):
            runs.setdefault(stage, []).append(run_stage(stage, folder, number))
    yield "read", runs


def _median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def summary(report: dict[str, Any]) -> dict[str, float]:
    """The figures that were asked for."""
    prepare, read = report["prepare"], report["read"]
    rate = {name: found["mb_per_s_a_core"] for name, found in prepare.items()}
    most = max(int(name.rsplit("_", 1)[1]) for name in rate)
    found = {
        "prepare_mb_per_s_a_core": rate["prepare_ours_1"],
        f"prepare_{most}_processes_of_linear": rate[f"prepare_ours_{most}"] / rate["prepare_ours_1"],
        "read_tokens_per_s": _median(read["read_ours"], "tokens_per_s"),
        "read_ratio_to_memmap": _median(read["read_ours"], "tokens_per_s")
        / _median(read["read_theirs"], "tokens_per_s"),
        f"step_{JUMP_STEP}_first_batch_s": _median(read["jump"], "first_batch_s"),
        f"wait_fraction_at_{TOKENS_PER_SECOND}_tokens_per_s": _median(read["wait"], "wait_fraction"),
    }
    for processes in (1, most):
        if f"prepare_theirs_{processes}" in rate:
            found[f"prepare_{processes}_ratio_to_hugging_face"] = (
                rate[f"prepare_ours_{processes}"] / rate[f"prepare_theirs_{processes}"]
            )
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = {"ours": "biomedlm_jax", "theirs": "datasets + tokenizers"}
    for axes, bars, label in (
        (
            left,
            [
                (f"{names[who]}\n{processes} process{'es' if processes != '1' else ''}", found["mb_per_s_a_core"], who)
                for name, found in report["prepare"].items()
                for _, who, processes in [name.split("_")]
            ],
            "MB of text a second and core,\ntext to rows",
        ),
        (
            right,
            [
                (title, _median(report["read"][f"read_{who}"], "tokens_per_s") / 1e6, who)
                for who, title in (("ours", "biomedlm_jax"), ("theirs", "NumPy memmap"))
            ],
            "million tokens a second, one process,\nrows to batches",
        ),
    ):
        shown = axes.barh(
            [name for name, _, _ in bars],
            [value for _, value, _ in bars],
            color=["#2a6f97" if who == "ours" else "#b0b7bc" for _, _, who in bars],
        )
        axes.bar_label(shown, fmt="%.1f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="*", default=[], help="files or globs of real text to take sentences from")
    parser.add_argument("--size-mb", type=int, default=96, help="of the text made of them")
    parser.add_argument("--files", type=int, default=16, help="that hold it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="1 and others")
    parser.add_argument("--read-tokens", type=int, default=100_000_000)
    parser.add_argument("--steps", type=int, default=20, help="of the training step that waits for batches")
    parser.add_argument("--small", action="store_true", help="little of everything")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--scratch", default=None, help="folder for what is made; by default the temporary one")
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        serve_stage(*args.stage)
        return
    if args.small:
        args.size_mb, args.files, args.rounds, args.read_tokens, args.steps = 2, 4, 1, 1_000_000, 2
    report: dict[str, Any] = timing.machine("cpu")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for name, part in measure(Path(scratch), args.size_mb * 1_000_000, args):
            report[name] = part
    report["summary"] = summary(report)
    path = timing.report_file(args.output, "data", "cpu")
    timing.write_report(path, report)
    draw(report, path.with_suffix(".png"))
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
