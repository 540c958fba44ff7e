"""From text to rows: what is in them, what is left out, and that nothing depends on who prepared them."""

import os
import subprocess

import pile
import pytest
import tiny

from biomedlm_jax import preparation, rows, synthetic
from biomedlm_jax.errors import UserError
from biomedlm_jax.preparation import agreement, card
from biomedlm_jax.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture
def pile_config(tmp_path):
    return pile.write_config(tmp_path)


def test_prepared_rows_hold_the_corpus(pile_config):
    preparation.ensure_prepared(pile_config)
    folder = pile_config.prepared_dir
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = pile.prepared_ids(folder, "train")
    assert ids.tolist() == pile.expected_ids([pile.ABSTRACTS[:30], pile.ABSTRACTS[30:]], tokenizer, 16)
    held_out = pile.prepared_ids(folder, "eval").tolist()
    assert held_out == [*tokenizer.encode("Held out\nA text of its own."), tokenizer.eos_id]

    manifest = rows.read_manifest(folder)
    train = manifest["splits"]["train"]
    assert train["documents"] == 60 and manifest["dropped"] == {"another set": 1}
    assert train["tokens"] == len(ids) == train["rows"] * 16
    assert train["tokens"] + train["tokens_left_over"] == sum(
        len(tokenizer.encode(text)) + 1 for text in pile.ABSTRACTS
    )
    assert train["bytes"] == sum(len(text.encode()) for text in pile.ABSTRACTS)
    assert manifest["tokenizer_sha256"] == tokenizer.fingerprint
    assert [shard["documents"] for shard in manifest["shards"]] == [30, 30, 1]
    assert not list(folder.parent.glob(".*.partial"))


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


def test_rows_of_files_that_changed_since_are_used_with_a_warning(pile_config, caplog, tmp_path):
    preparation.ensure_prepared(pile_config)
    preparation.ensure_prepared(tiny.replace(pile_config, data={"contaminated": "report"}))
    assert not caplog.records or "prepared from" not in caplog.text
    with (tmp_path / "train/01.jsonl.gz").open("ab") as file:
        file.write(bytes(10))
    for changed in ("01.jsonl.gz", "02.jsonl"):
        caplog.clear()
        preparation.ensure_prepared(pile_config)
        assert f"are not those that {pile_config.prepared_dir} was prepared from" in caplog.text
        assert f"{tmp_path / 'train' / changed} was added, taken away or changed" in caplog.text
        (tmp_path / "train/02.jsonl").write_text(pile.line("More."))
    caplog.clear()
    for file in (tmp_path / "train").iterdir():
        file.unlink()
    preparation.ensure_prepared(pile_config)
    assert "prepared from" not in caplog.text


def test_the_manifest_says_all_that_was_used(pile_config, tmp_path, monkeypatch):
    """Each of many files, the tokenizer, what was replaced; and what another host would need to do it again."""
    given = train_tokenizer(pile.ABSTRACTS[:10], 600, tmp_path / "tokenizer")
    (tmp_path / "texts").mkdir()
    for number in range(25):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(pile.ABSTRACTS[number])
    monkeypatch.chdir(tmp_path)
    data = {"source": "text", "train_files": "texts/*", "eval_files": (), "tokenizer": "tokenizer"}
    preparation.ensure_prepared(tiny.replace(pile_config, data=data))
    manifest = rows.read_manifest(pile_config.prepared_dir)
    assert manifest["shards"][0]["files"] == [f"texts/{number:02}.txt" for number in range(25)]
    assert manifest["tokenizer"] == "tokenizer" and manifest["tokenizer_sha256"] == given.fingerprint
    assert manifest["working_directory"] == str(tmp_path) and manifest["version"]
    assert manifest["replaced_surrogates"] == 0
    assert "texts/00.txt to texts/24.txt (25)" in (pile_config.prepared_dir / "README.md").read_text()


def test_replaced_surrogates_are_in_the_card(pile_config, tmp_path):
    (tmp_path / "train/02.jsonl").write_text(pile.line("A \ud800 and \udfff."))
    preparation.ensure_prepared(pile_config)
    assert rows.read_manifest(pile_config.prepared_dir)["replaced_surrogates"] == 2
    assert "2 lone surrogates became U+FFFD" in (pile_config.prepared_dir / "README.md").read_text()


def test_names_of_files_may_be_anything(pile_config, tmp_path):
    """Bytes that are no UTF-8, marks of tables and line ends."""
    for name in (b"caf\xe9.jsonl", b"a|b\nc.jsonl"):
        (tmp_path / "train" / os.fsdecode(name)).write_text("{broken\n" + pile.line(repr(name)))
    (tmp_path / os.fsdecode(b"val\xe9.jsonl")).write_text(pile.line("Held out."))
    data = {"eval_files": str(tmp_path / "val*"), "max_bad_fraction": 0.1}
    preparation.ensure_prepared(tiny.replace(pile_config, data=data))
    card = (pile_config.prepared_dir / "README.md").read_text(encoding="utf-8")
    rows_of_files = [line for line in card.splitlines() if line.startswith("| train_files |")]
    assert len(rows_of_files) == 4 and "a\\|b" in card and "caf" in card
    assert all(line.replace(r"\|", "").count("|") == 6 for line in rows_of_files)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({}, "language: en"),
        ({"pile_sets": ()}, None),
        ({"source": "pubmed_xml", "languages": ("eng", "ger", "mul")}, "language: [en, de, mul]"),
        ({"source": "pubmed_xml", "languages": ()}, None),
    ],
)
def test_the_card_names_the_languages_that_were_kept(pile_config, changes, line):
    settings = agreement.data_settings(tiny.replace(pile_config, data=changes))
    assert card._language(settings) == (f"{line}\n" if line else "")


def test_too_much_broken_text_is_refused(pile_config):
    train = pile_config.prepared_dir.parent / "train"
    (train / "02.jsonl").write_text("{broken\n" * 5)
    with pytest.raises(UserError, match=r"7.[0-9]% of the records are broken.*not JSON at .*02.jsonl:1"):
        preparation.ensure_prepared(pile_config)
    assert not pile_config.prepared_dir.exists()
    preparation.ensure_prepared(tiny.replace(pile_config, data={"max_bad_fraction": 0.1}))
    manifest = rows.read_manifest(pile_config.prepared_dir)
    assert manifest["dropped"]["not JSON"] == 5
    assert manifest["shards"][2]["samples"]["not JSON"][0] == f"{train / '02.jsonl'}:1"


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


def test_a_full_disk_is_named_and_the_work_goes_on_elsewhere(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a small disk")
    try:
        config = tiny.replace(model={"vocab_size": 600}, data={"dir": str(disk / "rows"), "synthetic_documents": 8000})
        with pytest.raises(OSError, match="No space left on device"):
            preparation.ensure_prepared(config)
        assert not (disk / "rows").exists()
        # More room, and the same command ends well.
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        preparation.ensure_prepared(config)
        assert rows.read_manifest(disk / "rows")["splits"]["train"]["documents"] == 8000
        # A mounted folder itself cannot be replaced, which is said before the work.
        with pytest.raises(UserError, match="is a mount point"):
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
