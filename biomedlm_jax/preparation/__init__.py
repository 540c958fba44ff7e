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
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from biomedlm_jax import corpus
from biomedlm_jax.config import Config, as_paths
from biomedlm_jax.corpus import BROKEN
from biomedlm_jax.errors import UserError
from biomedlm_jax.files import refuse_mount, share_lock, try_lock
from biomedlm_jax.preparation import choice, finish, shards, tasks
from biomedlm_jax.preparation.agreement import Plan, check_manifest, data_settings
from biomedlm_jax.preparation.shards import Shard
from biomedlm_jax.preparation.tasks import Task
from biomedlm_jax.rows import FORMAT, MANIFEST_FILE, read_manifest
from biomedlm_jax.tokenizer import TRAINING_BYTES, load_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)


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
    benchmark_files = tuple(corpus.expand_globs(as_paths(config.data.benchmark_files)))
    inputs = shards.input_shards(config.data, benchmark_files)
    plan = Plan(config, folder, work, inputs, benchmark_files)
    begun = False
    while not begun:
        with share_lock(lock_file, plan.begin) as alone:
            # What another one began may be gone with its end.
            begun = plan.has_begun()
            if begun and not alone:
                logger.info("rows: another process prepares %s; sharing the work", folder)
            if begun and not _is_prepared(config, folder):
                _prepare(plan)
    if folder.exists():
        _remove_work(work, lock_file)


def _remove_work(work: Path, lock_file: Path) -> None:
    """Takes the work away, unless others are still at it: then the last one does."""
    if work.exists():
        with try_lock(lock_file, wait=False) as alone:
            if alone:
                shutil.rmtree(work, ignore_errors=True)


def _is_prepared(config: Config, folder: Path) -> bool:
    if not (folder / MANIFEST_FILE).is_file():
        return False
    check_manifest(config, read_manifest(folder), folder)
    logger.info("rows: using %s", folder)
    return True


def _prepare(plan: Plan) -> None:
    config, data, work, inputs = plan.config, plan.config.data, plan.work, plan.inputs
    _check_tokenizer(config)

    # ---- 1: index
    benchmarks = shards.read_benchmarks(plan.benchmark_files) if plan.benchmark_files else None
    looked_for = benchmarks.digest() if benchmarks else ""
    index_tasks = [
        Task(
            work,
            f"index-{shard}",
            shards.digest([FORMAT, shard.key, looked_for if shard.split == "train" else ""]),
            shard.size,
            functools.partial(shards.index, shard, plan.benchmark_files, work),
        )
        for shard in inputs
    ]
    read = tasks.run("reading text", index_tasks, data.processes)
    _check_text(config, inputs, read)

    # ---- 2: choose
    decided_by = [task.key for task in index_tasks] + [data_settings(config)]
    choose_task = Task(
        work, "choice", shards.digest(decided_by), 0, functools.partial(_choose, config, inputs, read, work)
    )
    chosen = tasks.run("choosing documents", [choose_task], 1)[0]["shards"]
    _check_choice(config, chosen)

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
    made = finish.Prepared(config, data_settings(config), inputs, read, chosen, encoded)
    if benchmarks:
        made.contamination = choice.contamination_report(inputs, read, benchmarks, work)
        made.contamination["action"] = data.contaminated
    with try_lock(work / "finish.lock", wait=True):
        if not _is_prepared(config, plan.folder):
            complete = work / "complete"
            shutil.rmtree(complete, ignore_errors=True)
            complete.mkdir()
            finish.finish(made, work, complete)
            complete.replace(plan.folder)
            finish.log_summary(read_manifest(plan.folder))


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
                logger.warning("rows: %.1f%% of %s is broken: %s", 100 * result["bad_fraction"], shard.name, broken)
        if results and data.source != "synthetic" and not report.documents:
            first = next(shard for shard in inputs if shard.split == split).name
            text = "text" if split == "train" else "text to evaluate on"
            sets = f"; data.pile_sets is {list(data.pile_sets)}" if data.source in ("pile", "parquet") else ""
            dropped = dict(report.dropped)
            raise UserError(f"no {text} in data.{split}_files ({first}, ...): left out are {dropped}{sets}")


def _check_choice(config: Config, chosen: list[dict[str, Any]]) -> None:
    if config.data.source != "synthetic" and not any(result["train_bytes"] for result in chosen):
        left_out = sum((Counter(result["dropped"]) for result in chosen), Counter[str]())
        raise UserError(f"no document of data.train_files is left to train on: left out are {dict(left_out)}")


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
