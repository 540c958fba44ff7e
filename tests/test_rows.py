"""The store of rows: packing, opening, and damage."""

import json

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
