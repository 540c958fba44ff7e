"""The store of rows: packing, opening, and damage."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pile
import pytest
import tensorflow_datasets as tfds

from biomedlm_jax import preparation, rows
from biomedlm_jax.corpus import Document
from biomedlm_jax.errors import UserError
from biomedlm_jax.tokenizer import train_tokenizer


@pytest.fixture
def pile_config(tmp_path):
    return pile.write_config(tmp_path)


def test_packing_is_the_concatenation_of_documents(tmp_path):
    tokenizer = train_tokenizer(pile.ABSTRACTS, 600, tmp_path)
    documents = [Document(text, "PubMed Abstracts") for text in pile.ABSTRACTS * 10]  # more than one batch of encoding
    packed = list(rows.pack_rows(documents, tokenizer, 16))
    expected = [token for text in pile.ABSTRACTS * 10 for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert np.concatenate(packed).tolist() == expected
    assert {len(row) for row in packed[:-1]} == {16} and 0 < len(packed[-1]) <= 16
    assert packed[0].dtype == np.uint16
    assert list(rows.pack_rows([], tokenizer, 16)) == []
    assert rows.row_dtype(65_536) == np.uint16 and rows.row_dtype(65_537) == np.uint32


def test_rows_are_a_tfds_data_set(pile_config):
    preparation.ensure_prepared(pile_config)
    builder = tfds.builder_from_directory(str(pile_config.prepared_dir / "rows"))
    assert set(builder.info.splits) == {"train", "eval"}
    opened = rows.open_rows(pile_config.prepared_dir, "train")
    assert builder.info.splits["train"].num_examples == len(opened)
    np.testing.assert_array_equal(builder.as_data_source("train")[3]["tokens"], opened.source[3]["tokens"])


def test_damage_is_noticed(pile_config):
    preparation.ensure_prepared(pile_config)
    folder = pile_config.prepared_dir
    manifest = json.loads((folder / "manifest.json").read_text())
    fewer = manifest["splits"] | {"train": manifest["splits"]["train"] | {"rows": 7}}
    for text, message in [
        (json.dumps(manifest | {"format": 99}), "is not of format 2"),
        (json.dumps({"format": 2}), "is damaged .it lacks eos_id, n_positions, settings"),
        ("[1, 2]", "is not of format 2"),
        ("{", "is damaged"),
        ("\udcff", "is damaged"),
        (json.dumps(manifest | {"splits": fewer}), "its manifest says 7"),
    ]:
        (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=message):
            rows.open_rows(folder, "train")


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "features.json", "dataset_info.json"])
def test_damaged_files_are_named(pile_config, damage):
    preparation.ensure_prepared(pile_config)
    folder = pile_config.prepared_dir
    file = next((folder / "rows").glob("*train*array_record*"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        (file if damage == "gone" else folder / "rows" / damage).unlink()
    with pytest.raises(UserError, match=f"{folder / 'rows'} .*delete the folder and prepare it again"):
        rows.open_rows(folder, "train")


def test_many_rows_at_once_are_those_one_by_one(tmp_path):
    config = pile.write_config(tmp_path)
    preparation.ensure_prepared(config)
    opened = rows.open_rows(config.prepared_dir, "train")
    builder = tfds.builder_from_directory(str(config.prepared_dir / "rows"))
    assert len(builder.info.splits["train"].shard_lengths) == 2
    by_tfds = np.stack([row["tokens"] for row in builder.as_data_source("train")])
    assert len(opened) == len(by_tfds) > 100
    for seed in range(20):
        indices = np.random.default_rng(seed).integers(0, len(opened), 40).tolist()
        found = opened.read(indices)
        assert found.dtype == np.uint16 and found.shape == (40, 16)
        np.testing.assert_array_equal(found, by_tfds[indices])
    np.testing.assert_array_equal(opened.read(range(len(opened))), by_tfds)
    np.testing.assert_array_equal(opened.source[-1]["tokens"], by_tfds[-1])
    np.testing.assert_array_equal([row["tokens"] for row in opened.source[3:9]], by_tfds[3:9])
    with pytest.raises(IndexError):
        opened.source[len(opened)]
    # Of rows in memory, too.
    in_memory = dataclasses.replace(opened, source=list(opened.source))
    np.testing.assert_array_equal(in_memory.read([5, 2]), by_tfds[[5, 2]])
    in_memory.check_unchanged()


def _overwrite(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("which", ["rows", "manifest"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_overwrite, "was written since"),
        (lambda file: file.write_bytes(file.read_bytes()[:-5]), r"was [\d,]+ bytes and is [\d,]+ since"),
        (lambda file: file.unlink(), "is gone since"),
        (lambda file: shutil.move(shutil.copyfile(file, f"{file}.new"), file), "was written since"),
    ],
    ids=["overwritten", "shorter", "gone", "replaced"],
)
def test_a_store_that_changes_is_noticed(pile_config, which, change, message):
    preparation.ensure_prepared(pile_config)
    folder = pile_config.prepared_dir
    opened = {split: rows.open_rows(folder, split) for split in ("train", "eval")}
    file = sorted((folder / "rows").glob("*train*array_record*"))[1] if which == "rows" else folder / "manifest.json"
    for split in opened.values():
        split.read(range(len(split)))
        split.check_unchanged()
    # Times of file systems are coarse: what changes at once may have the same.
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns - 10**9))
    opened["train"] = rows.open_rows(folder, "train")
    change(file)
    with pytest.raises(UserError, match=f"{file} {message} this run began to read the rows of {folder}"):
        opened["train"].check_unchanged()
    if which == "rows":
        opened["eval"].check_unchanged()  # whose files are others


def test_another_file_of_as_many_rows_is_noticed(pile_config):
    """It is whole, and its rows are others than the manifest speaks of."""
    preparation.ensure_prepared(pile_config)
    folder = pile_config.prepared_dir
    manifest = json.loads((folder / "manifest.json").read_text())
    file = manifest["splits"]["train"]["files"][0]
    writer = rows.RowWriter(folder / "rows" / file["name"], 16, 600)
    writer.write(np.zeros(file["rows"] * 16, np.uint16))
    writer.close()
    with pytest.raises(UserError, match=f"is not what was prepared: {file['name']} has .* says {file['bytes']:,}"):
        rows.open_rows(folder, "train")


def test_a_file_that_breaks_while_it_is_read_is_named(pile_config):
    preparation.ensure_prepared(pile_config)
    opened = rows.open_rows(pile_config.prepared_dir, "train")
    file = sorted((pile_config.prepared_dir / "rows").glob("*train*array_record*"))[0]
    with file.open("r+b") as handle:
        handle.write(bytes(file.stat().st_size))
    with pytest.raises(UserError, match=f"{file} cannot be read any more"):
        opened.read(range(len(opened)))
