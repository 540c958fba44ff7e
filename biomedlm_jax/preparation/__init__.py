"""From text to rows, by any number of processes on any number of machines, going on where it stopped.

    1. index      each input shard: hash, size and PMID of each document; what is broken; texts of benchmarks
    2. choose     of all documents, which are training rows, which are held out, which are left out and why
    3. tokenizer  a copy of the one given, or one trained on a sample of the training documents
    4. encode     each input shard into one file of rows a split
    5. finish     the shards' ends make a last file; names of TFDS, manifest, data card

Each is made of `tasks`, whose results lie in .NAME.partial beside the folder to be, until that is complete and
appears under its name. Nothing in the result depends on who did which task, or how often it was killed.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from biomedlm_jax import corpus
from biomedlm_jax.config import Config, as_paths
from biomedlm_jax.corpus import BROKEN
from biomedlm_jax.errors import UserError
from biomedlm_jax.files import refuse_mount, replace_file, try_lock
from biomedlm_jax.preparation import choice, finish, shards, tasks
from biomedlm_jax.preparation.shards import Shard
from biomedlm_jax.preparation.tasks import Task
from biomedlm_jax.rows import FORMAT, MANIFEST_FILE, read_manifest
from biomedlm_jax.tokenizer import TRAINING_BYTES, load_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

_FILES = ("source", "train_files", "eval_files", "eval_fraction", "benchmark_files", "contaminated")
# Settings that decide what the rows are.
_DATA_SETTINGS = {
    "synthetic": ("source", "synthetic_documents", "synthetic_eval_documents"),
    "pile": (*_FILES, "pile_sets", "text_field"),
    "parquet": (*_FILES, "pile_sets", "text_field"),
    "pubmed_xml": (*_FILES, "languages"),
    "jats_xml": (*_FILES, "languages"),
    "text": _FILES,
}
_PATHS = ("train_files", "eval_files", "benchmark_files")
_OTHER_FOLDER = "choose another data.dir, or delete the folder to prepare it again"


def ensure_prepared(config: Config) -> None:
    """Prepares the rows that a configuration asks for, unless they are there.

    The folder is either complete or absent. Other processes that prepare the same rows share the work.

    Raises:
      UserError: the text cannot be read, has too many broken records or too little text, the tokenizer's
        vocabulary is not the model's, or the folder holds other rows than the configuration asks for.
    """
    folder = Path(os.path.abspath(config.prepared_dir))
    lock_file, work = folder.with_name(f".{folder.name}.lock"), folder.with_name(f".{folder.name}.partial")
    # Looked for before the lock, too: complete rows may lie where nothing can be written.
    if _is_prepared(config, folder):
        with contextlib.suppress(OSError):
            _remove_work(work, lock_file)
        return
    refuse_mount(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and holds no prepared rows (no {MANIFEST_FILE}): choose another data.dir")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _begin(config, work, lock_file)
    with try_lock(lock_file, wait=True, shared=True):
        if not _is_prepared(config, folder):
            work.mkdir(exist_ok=True)
            _prepare(config, work, folder)
    if folder.exists():
        _remove_work(work, lock_file)


def _remove_work(work: Path, lock_file: Path) -> None:
    """Takes the work away, unless others are still at it: then the last one does."""
    if work.exists():
        with try_lock(lock_file, wait=False) as alone:
            if alone:
                shutil.rmtree(work, ignore_errors=True)


def _begin(config: Config, work: Path, lock_file: Path) -> None:
    """Writes what is being prepared, or joins others who prepare the same."""
    path = work / "settings.json"
    wanted = _settings(config) | {
        "n_positions": config.model.n_positions,
        "vocab_size": config.model.vocab_size,
        "tokenizer": config.data.tokenizer,
    }
    with try_lock(lock_file, wait=False) as alone:
        if alone:
            if not work.exists():
                logger.info(
                    "rows: preparing them from data.source %s; unfinished work lies in %s", config.data.source, work
                )
            work.mkdir(exist_ok=True)
            replace_file(path, json.dumps(wanted).encode())
            return
    logger.info("rows: another process prepares %s; sharing the work", work)
    with contextlib.suppress(FileNotFoundError, ValueError):  # it has just ended
        begun = json.loads(path.read_bytes())
        for name, value in wanted.items():
            if begun.get(name) != value:
                raise UserError(
                    f"another process prepares these rows with {name} {begun.get(name)}, and this configuration has "
                    f"{value}: wait for it to end, or choose another data.dir"
                )


def _is_prepared(config: Config, folder: Path) -> bool:
    if not (folder / MANIFEST_FILE).is_file():
        return False
    check_manifest(config, read_manifest(folder), folder)
    logger.info("rows: using %s", folder)
    return True


def _settings(config: Config) -> dict[str, Any]:
    """The settings that decide what the rows are, as JSON would read them back."""
    values = {name: getattr(config.data, name) for name in _DATA_SETTINGS[config.data.source]}
    for name in _PATHS:
        if name in values:
            values[name] = as_paths(values[name])
    return json.loads(json.dumps(values))


def check_manifest(config: Config, manifest: dict[str, Any], folder: Path) -> None:
    """Raises: UserError: the rows of a folder are not those that a configuration asks for."""
    have, want = manifest["settings"], _settings(config)
    # Rows prepared before may be used without saying again what from.
    unsaid = {name for name in _PATHS if not want.get(name)}
    if not want.get("train_files"):
        unsaid |= {"eval_fraction", "contaminated"}
    differing = [name for name in want if name not in unsaid and have.get(name) != want[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"{folder} was prepared with data.{name} {have.get(name)}, and this configuration has {want[name]}: "
            f"{_OTHER_FOLDER}"
        )
    if config.data.tokenizer and load_tokenizer(config.data.tokenizer).fingerprint != manifest["tokenizer_sha256"]:
        raise UserError(f"{folder} was prepared with another tokenizer than {config.data.tokenizer}: {_OTHER_FOLDER}")
    for name, here in (("n_positions", config.model.n_positions), ("vocab_size", config.model.vocab_size)):
        if manifest[name] != here:
            raise UserError(
                f"{folder} was prepared with model.{name} {manifest[name]}, and this configuration has {here}: "
                f"{_OTHER_FOLDER}"
            )


def _prepare(config: Config, work: Path, folder: Path) -> None:
    data = config.data
    benchmark_files = tuple(corpus.expand_globs(as_paths(data.benchmark_files)))
    inputs = shards.input_shards(data, benchmark_files)
    _check_tokenizer(config)

    # ---- 1: index
    benchmarks = shards.read_benchmarks(benchmark_files) if benchmark_files else None
    fingerprint = benchmarks.fingerprint if benchmarks else ""
    index_tasks = [
        Task(
            work,
            f"index-{shard}",
            shards.digest([FORMAT, shard.key, fingerprint if shard.split == "train" else ""]),
            shard.size,
            functools.partial(shards.index, shard, benchmark_files, work),
        )
        for shard in inputs
    ]
    read = tasks.run("reading text", index_tasks, data.processes)
    _check_text(config, inputs, read)

    # ---- 2: choose
    decided_by = [task.key for task in index_tasks] + [_settings(config)]
    choose_task = Task(
        work, "choice", shards.digest(decided_by), 0, functools.partial(_choose, config, inputs, read, work)
    )
    chosen = tasks.run("choosing documents", [choose_task], 1)[0]["shards"]

    # ---- 3: tokenizer
    tokenizer_folder = work / "tokenizer"
    tokenizer_task = _tokenizer_task(config, inputs, chosen, choose_task.key, work)
    tokenizer_key = tasks.run("training a tokenizer", [tokenizer_task], 1)[0]["sha256"]

    # ---- 4: encode
    encode_tasks = [
        Task(
            work,
            f"rows-{shard}",
            shards.digest([choose_task.key, tokenizer_key, config.model.n_positions]),
            shard.size,
            functools.partial(shards.encode, shard, work, tokenizer_folder, config.model.n_positions),
        )
        for shard in inputs
    ]
    encoded = tasks.run("encoding rows", encode_tasks, data.processes)

    # ---- 5: finish
    made = finish.Prepared(config, _settings(config), inputs, read, chosen, encoded)
    if benchmarks:
        made.contamination = choice.contamination_report(inputs, read, benchmarks) | {"action": data.contaminated}
    with try_lock(work / "finish.lock", wait=True):
        if not _is_prepared(config, folder):
            complete = work / "complete"
            shutil.rmtree(complete, ignore_errors=True)
            complete.mkdir()
            finish.finish(made, work, complete)
            complete.replace(folder)
            finish.log_summary(read_manifest(folder))


def _check_tokenizer(config: Config) -> None:
    if config.data.tokenizer:
        words = load_tokenizer(config.data.tokenizer).vocab_size
        if words != config.model.vocab_size:
            raise UserError(
                f"the tokenizer {config.data.tokenizer} has {words} words, and model.vocab_size is "
                f"{config.model.vocab_size}: set model.vocab_size to {words}"
            )


def _check_text(config: Config, inputs: list[Shard], read: list[dict[str, Any]]) -> None:
    """Refuses text of which too much is broken, or which is all left out."""
    data = config.data
    for split in shards.SPLITS:
        results = [result for shard, result in zip(inputs, read, strict=True) if shard.split == split]
        report = finish.total_report(results)
        report.check(data.max_bad_fraction)
        for shard, result in zip(inputs, read, strict=True):
            if shard.split == split and result["bad_fraction"] > data.max_bad_fraction:
                broken = {name: count for name, count in result["dropped"].items() if name in BROKEN}
                logger.warning("rows: %.1f%% of %s is broken: %s", 100 * result["bad_fraction"], shard.files[0], broken)
        if results and data.source != "synthetic" and not report.documents:
            first = next(shard for shard in inputs if shard.split == split).files[0]
            text = "text" if split == "train" else "text to evaluate on"
            sets = f"; data.pile_sets is {list(data.pile_sets)}" if data.source in ("pile", "parquet") else ""
            dropped = dict(report.dropped)
            raise UserError(f"no {text} in data.{split}_files ({first}, ...): left out are {dropped}{sets}")


def _choose(
    config: Config, inputs: list[Shard], read: list[dict[str, Any]], work: Path, advance: tasks.Advance
) -> dict[str, Any]:
    indexes = choice.Indexes.load(inputs, read, work)
    return {"shards": choice.write_choice(config.data, indexes, work)}


def _tokenizer_task(
    config: Config, inputs: list[Shard], chosen: list[dict[str, Any]], choice_key: str, work: Path
) -> Task:
    """Copies the tokenizer that was asked for, or trains one on the abstracts of the training text, if it has any."""
    given = config.data.tokenizer
    if given:
        make = functools.partial(_copy_tokenizer, given, work / "tokenizer")
        return Task(work, "tokenizer", shards.digest([load_tokenizer(given).fingerprint]), 0, make)
    key = shards.digest([choice_key, config.model.vocab_size])
    abstract_bytes = sum(result["abstract_bytes"] for result in chosen)
    size = abstract_bytes or sum(result["train_bytes"] for result in chosen)
    fraction = min(1.0, TRAINING_BYTES / max(size, 1))
    sources = [shard for shard, result in zip(inputs, chosen, strict=True) if result["train_bytes"]]
    make = functools.partial(
        _train_tokenizer,
        sources,
        abstract_bytes > 0,
        fraction,
        config.model.vocab_size,
        work,
        config.data.processes,
        key,
    )
    return Task(work, "tokenizer", key, 0, make)


def _copy_tokenizer(given: str, folder: Path, advance: tasks.Advance) -> dict[str, Any]:
    tokenizer = load_tokenizer(given)
    shutil.rmtree(folder, ignore_errors=True)  # of another kind, perhaps
    tokenizer.save(folder)
    return {"sha256": tokenizer.fingerprint}


def _train_tokenizer(
    sources: list[Shard],
    abstracts_only: bool,
    fraction: float,
    vocab_size: int,
    work: Path,
    processes: int,
    key: str,
    advance: tasks.Advance,
) -> dict[str, Any]:
    sample_tasks = [
        Task(
            work,
            f"sample-{shard}",
            key,
            shard.size,
            functools.partial(shards.sample, shard, work, abstracts_only, fraction),
        )
        for shard in sources
    ]
    tasks.run("sampling text for a tokenizer", sample_tasks, processes)
    logger.info("tokenizer: training one of %d words on %.0f%% of the text", vocab_size, 100 * fraction)
    folder = work / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = train_tokenizer(shards.sampled_texts(sources, work), vocab_size, folder)
    return {"sha256": tokenizer.fingerprint}
