"""From text to rows: what is in them, what is left out, and that nothing depends on who prepared them."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pile
import pytest
import tiny

from biomedlm_jax import config as config_lib
from biomedlm_jax import files, preparation, rows, synthetic
from biomedlm_jax.errors import UserError
from biomedlm_jax.preparation import choice, shards
from biomedlm_jax.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture
def pile_config(tmp_path):
    return pile.write_config(tmp_path)


def test_prepared_rows_hold_the_corpus(pile_config):
    preparation.ensure_prepared(pile_config)
    folder = pile_config.prepared_dir
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = pile.prepared_ids(folder, "train")
    texts = tokenizer.decode([token for token in ids.tolist() if token != tokenizer.eos_id])
    assert "".join(pile.ABSTRACTS).startswith(texts) and len(texts) > 0.99 * len("".join(pile.ABSTRACTS))
    held_out = pile.prepared_ids(folder, "eval").tolist()
    assert held_out == [*tokenizer.encode("Held out\nA text of its own."), tokenizer.eos_id]

    manifest = rows.read_manifest(folder)
    train = manifest["splits"]["train"]
    assert train["documents"] == 60 and train["dropped"] == {"another set": 1}
    assert train["tokens"] == len(ids) == train["rows"] * 16
    assert train["tokens"] + train["tokens_left_over"] == sum(len(tokenizer.encode(text)) + 1 for text in pile.ABSTRACTS)
    assert manifest["tokenizer_sha256"] == tokenizer.fingerprint
    assert not list(folder.parent.glob("*.partial"))


def test_files_are_split_past_their_size(pile_config, monkeypatch):
    preparation.ensure_prepared(pile_config)
    whole = pile.prepared_ids(pile_config.prepared_dir, "train")
    monkeypatch.setattr(rows, "_ROWS_PER_FILE", 100)
    other = tiny.replace(pile_config, data={"dir": str(pile_config.prepared_dir.parent / "split")})
    preparation.ensure_prepared(other)
    assert len(list((other.prepared_dir / "rows").glob("*train*array_record*"))) == -(-len(whole) // 1600)
    np.testing.assert_array_equal(pile.prepared_ids(other.prepared_dir, "train"), whole)


def test_what_is_there_is_used_and_anything_else_refused(pile_config):
    preparation.ensure_prepared(pile_config)
    folder = pile_config.prepared_dir
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    preparation.ensure_prepared(pile_config)
    # Prepared rows serve without the text that they were made from.
    preparation.ensure_prepared(tiny.replace(pile_config, data={"train_files": (), "eval_files": ()}))
    for changes, message in [
        ({"model": {"vocab_size": 700}}, "model.vocab_size 600, and this configuration has 700"),
        ({"model": {"n_positions": 32}}, "model.n_positions 16, and this configuration has 32"),
        ({"data": {"pile_sets": ("PubMed Central",)}}, "data.pile_sets .*PubMed Central"),
        ({"data": {"train_files": "elsewhere/*"}}, "data.train_files .*elsewhere"),
        ({"data": {"source": "synthetic"}}, "data.source pile, and this configuration has synthetic"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            preparation.ensure_prepared(tiny.replace(pile_config, **changes))
        assert str(folder) in str(error.value)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_failure_leaves_nothing_behind(pile_config):
    train = pile_config.prepared_dir.parent / "train"
    (train / "02.jsonl").write_text("{broken\n" * 5)
    with pytest.raises(UserError, match=r"7.[0-9]% of the records are broken.*not JSON at .*02.jsonl:1"):
        preparation.ensure_prepared(pile_config)
    assert sorted(path.name for path in train.parent.iterdir()) == [".prepared.lock", "train", "val.jsonl"]
    preparation.ensure_prepared(tiny.replace(pile_config, data={"max_bad_fraction": 0.1}))
    assert rows.read_manifest(pile_config.prepared_dir)["splits"]["train"]["dropped"]["not JSON"] == 5


def test_mistakes_are_named(pile_config, tmp_path):
    for changes, message in [
        ({"data": {"train_files": str(tmp_path / "none*")}}, "none"),
        (
            {"data": {"eval_files": str(tmp_path / "train" / "00.jsonl")}},
            "00.jsonl is in data.train_files and in data.eval",
        ),
        ({"data": {"tokenizer": str(tmp_path / "train")}}, "holds no tokenizer"),
        ({"model": {"vocab_size": 100}}, "a vocabulary of 100 is too small"),
        ({"model": {"n_positions": 100_000}}, r"tokens, fewer than one row of model.n_positions \(100000\)"),
    ]:
        with pytest.raises(UserError, match=message):
            preparation.ensure_prepared(tiny.replace(pile_config, **changes))
        assert not pile_config.prepared_dir.exists()
    train_tokenizer(pile.ABSTRACTS, 500, tmp_path / "tokenizer")
    with pytest.raises(UserError, match="has 500 words, and model.vocab_size is 600: set model.vocab_size to 500"):
        preparation.ensure_prepared(tiny.replace(pile_config, data={"tokenizer": str(tmp_path / "tokenizer")}))


def test_a_given_tokenizer_is_copied(pile_config, tmp_path):
    given = train_tokenizer(pile.ABSTRACTS[:10], 600, tmp_path / "tokenizer")
    preparation.ensure_prepared(tiny.replace(pile_config, data={"tokenizer": str(tmp_path / "tokenizer")}))
    assert load_tokenizer(pile_config.prepared_dir / "tokenizer").fingerprint == given.fingerprint


def test_a_folder_of_something_else_is_left_alone(pile_config):
    pile_config.prepared_dir.mkdir()
    (pile_config.prepared_dir / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and holds no prepared rows"):
        preparation.ensure_prepared(pile_config)
    assert os.listdir(pile_config.prepared_dir) == ["thesis.txt"]


def test_another_process_is_waited_for(pile_config, caplog):
    pile_config.prepared_dir.parent.mkdir(exist_ok=True)
    taken = threading.Event()
    lock_file = pile_config.prepared_dir.with_name(".prepared.lock")

    def hold():
        with files.lock(lock_file, lambda: None):
            taken.set()
            time.sleep(1)
            assert not pile_config.prepared_dir.exists()

    with concurrent.futures.ThreadPoolExecutor() as pool, caplog.at_level("INFO"):
        holder = pool.submit(hold)
        taken.wait()
        preparation.ensure_prepared(pile_config)
        holder.result()
    assert "another process prepares" in caplog.text and pile_config.prepared_dir.exists()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a small disk")
    try:
        config = tiny.replace(model={"vocab_size": 600}, data={"dir": str(disk / "rows"), "synthetic_documents": 8000})
        with pytest.raises(OSError, match="No space left on device"):
            preparation.ensure_prepared(config)
        assert sorted(path.name for path in disk.iterdir()) == [".rows.lock"]
        # Nor can a mounted folder itself be replaced, which is said before the work.
        with pytest.raises(UserError, match="is a mount point"):
            (disk / ".rows.lock").unlink()
            preparation.ensure_prepared(tiny.replace(config, data={"dir": str(disk)}))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_text_that_is_all_left_out_is_named(pile_config):
    with pytest.raises(UserError, match=r"no text in data.train_files .*00.jsonl.*'another set': 61.*\['Books3'\]"):
        preparation.ensure_prepared(tiny.replace(pile_config, data={"pile_sets": ("Books3",)}))


def test_synthetic_rows_know_their_entropy(tmp_path):
    config = tiny.replace(
        model={"vocab_size": 600},
        data={"dir": str(tmp_path / "rows"), "synthetic_documents": 60, "synthetic_eval_documents": 7},
    )
    preparation.ensure_prepared(config)
    held_out = rows.open_rows(config.prepared_dir, "eval")
    expected = sum(synthetic.generate(index).entropy for index in range(60, 67))
    assert held_out.entropy == pytest.approx(expected / held_out.tokens)
    tokenizer = load_tokenizer(config.prepared_dir / "tokenizer")
    ids = [
        token
        for index in range(60, 67)
        for token in [*tokenizer.encode(synthetic.generate(index).text), tokenizer.eos_id]
    ]
    assert pile.prepared_ids(config.prepared_dir, "eval").tolist() == ids

