"""The command that shows what a tokenizer makes of words and files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizer_texts import corpus

from biomedlm_jax.corpus import Document
from biomedlm_jax.tokenizer import inspection, load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
WORDS = ["chromatography", "cytotoxicity", "Immunohistochemistry", "photosynthesis", "probiotic"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([*corpus(), *["A study of chromatography and\nchromatography"] * 200], 600, folder)
    return folder


@pytest.fixture(scope="module")
def gpt2_kind(tmp_path_factory):
    """Of GPT-2's kind, by its makers' names for the files."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    trained.train_from_iterator(corpus(), vocab_size=500, min_frequency=2, show_progress=False)
    folder = tmp_path_factory.mktemp("gpt2")
    trained.save_model(str(folder))
    (folder / "vocab.json").rename(folder / "encoder.json")
    (folder / "merges.txt").rename(folder / "vocab.bpe")
    return folder


def inspect(*args, status: int = 0, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "biomedlm_jax.tokenizer", "inspect", *map(str, args)],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **environment},
    )
    assert result.returncode == status, result.stderr
    assert status or not result.stderr, result.stderr
    return result.stdout if status == 0 else result.stderr


def columns(table: str) -> list[list[str]]:
    """Cells of a table whose columns are at least two spaces apart, cut where its header and all lines have a gap."""
    lines = table.splitlines()
    width = max(map(len, lines))
    padded = [line.ljust(width) for line in lines]
    blank = [all(line[column] == " " for line in padded) for column in range(width)]
    gaps = [match.span() for match in re.finditer("1{2,}", "".join("1" if b else "0" for b in blank))]
    edges = [0, *[end for _, end in gaps if end < width]]
    return [[line[a:b].strip() for a, b in zip(edges, [*edges[1:], width], strict=True)] for line in padded]


def test_words(folder):
    *table, summary = inspect(folder, "chromatography", "zinc").splitlines()
    tokenizer = load_tokenizer(folder)
    header, *rows = columns("\n".join(table))
    assert header == ["text", "tokens", "pieces", "ids"]
    for row, text in zip(rows, ["chromatography", " chromatography", "zinc", " zinc"], strict=True):
        ids = tokenizer.encode(text)
        pieces = " | ".join(map(tokenizer.piece, ids))
        assert row == [repr(text), str(len(ids)), pieces, " ".join(map(str, ids))]
    assert rows[1][1] == "1"
    assert summary == "single tokens: 1 of 2 words after a space, 1 of 2 at a start"


def test_words_and_bytes_beside_gpt2(folder, gpt2_kind, tmp_path):
    texts = ["zinc, zinc\nzinc (zinc) Zinc zincs a_zinc zinc", "é zinc-zinc"]
    records = [{"text": text, "meta": {"pile_set_name": "PubMed Abstracts"}} for text in texts]
    records.append({"text": "zinc", "meta": {"pile_set_name": "PubMed Central"}})
    records.append({"text": "zinc", "meta": {"pile_set_name": "Github"}})
    (tmp_path / "00.jsonl").write_text("\n".join(map(json.dumps, records)))
    output = inspect(folder, "zinc", "--gpt2", gpt2_kind, "--data", tmp_path / "*.jsonl")
    words, sizes, left_out = output.split("\n\n")
    assert left_out == f"left out: 1 another set ({tmp_path / '00.jsonl'}:4)\n"
    *table, ours, theirs = words.splitlines()
    header, at_start, after_space = columns("\n".join(table))
    assert header == ["text", "count", "tokens", "pieces", "ids", "GPT-2 tokens", "GPT-2 pieces", "GPT-2 ids"]
    assert (at_start[1], after_space[1]) == ("5", "3"), "'zinc' at starts and after signs, and after spaces"
    gpt2 = load_tokenizer(gpt2_kind)
    ids = gpt2.encode(" zinc")
    assert after_space[5:] == [str(len(ids)), " | ".join(map(gpt2.piece, ids)), " ".join(map(str, ids))]
    assert ours == "single tokens: 0 of 1 words after a space, 0 of 1 at a start"
    assert theirs == "single tokens of GPT-2: 0 of 1 words after a space, 0 of 1 at a start"

    tokenizer = load_tokenizer(folder)
    header, *rows = columns(sizes)
    assert header[3:] == ["tokens", "bytes a token of 600", "GPT-2 tokens", f"bytes a token of {gpt2.vocab_size}"]
    sources = {"PubMed Abstracts": texts, "PubMed Central": ["zinc"], "all": [*texts, "zinc"]}
    for row, (source, its_texts) in zip(rows, sources.items(), strict=True):
        size = sum(len(text.encode()) for text in its_texts)
        expected = [source, str(len(its_texts)), str(size)]
        for one in (tokenizer, gpt2):
            tokens = sum(len(one.encode(text)) for text in its_texts)
            expected += [str(tokens), f"{size / tokens:.3f}"]
        assert row == expected


def test_the_other_tokenizer_may_be_of_any_kind(folder, gpt2_kind):
    table = inspect(gpt2_kind, "zinc", "--gpt2", folder)
    assert columns("\n".join(table.splitlines()[:3]))[0][4:] == ["GPT-2 tokens", "GPT-2 pieces", "GPT-2 ids"]


def test_without_words_only_the_files_are_measured(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("immunology of zinc")
    (header, row) = inspect(folder, "--data", tmp_path / "notes.txt").splitlines()
    assert header.split()[:3] == ["source", "documents", "bytes"] and row.split()[-3] == "18"


def test_mistakes(folder, tmp_path):
    assert inspect(folder, status=2) == "error: nothing to show: give words, or --data FILE...\n"
    assert "no-such-folder does not exist" in inspect(folder, "zinc", "--gpt2", "no-such-folder", status=2)
    assert "matches no file" in inspect(folder, "--data", tmp_path / "*.zst", status=2)
    record = {"text": "zinc", "meta": {"pile_set_name": "Github"}}
    (tmp_path / "00.jsonl").write_text(json.dumps(record))
    assert "no text in" in inspect(folder, "--data", tmp_path / "00.jsonl", status=2)


def test_any_format_and_field_is_read(folder, tmp_path):
    pq.write_table(pa.table({"body": ["immunology of zinc"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "zinc"}))
    data = ("--data", tmp_path / "*.*", "--text-field", "body", "--pile-sets")
    *_, total = columns(inspect(folder, *data))
    assert total[:3] == ["all", "2", "22"]
    assert "set data.pile_sets" in inspect(folder, "--data", tmp_path / "a.parquet", "--text-field", "body", status=2)


def train(*args) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "biomedlm_jax.tokenizer", "train", *map(str, args), "--vocab-size", "400"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_training_counts_what_it_leaves_out_once(tmp_path):
    """Also where there are no abstracts, and the files are read twice."""
    for name in ("PubMed Abstracts", "PubMed Central"):
        path = tmp_path / f"{name.split()[1]}.jsonl"
        records = [{"text": text, "meta": {"pile_set_name": name}} for text in corpus()[:50]]
        records.append({"text": "x", "meta": {"pile_set_name": "Github"}})
        path.write_text("\n".join(map(json.dumps, records)))
        done = train("--input", path, "--output", tmp_path / path.stem)
        assert done.returncode == 0, done.stderr
        assert f"left out: 1 another set ({path}:51)" in done.stdout
    path.write_text("\n".join(corpus()[:50]))
    assert train("--input", path, "--output", tmp_path / "broken").returncode == 2
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in corpus()[:50]))
    options = ["--input", tmp_path / "text.jsonl", "--output", tmp_path / "made", "--pile-sets", "--text-field"]
    assert train(*options, "body").returncode == 0
    broken = train("--input", path, "--output", tmp_path / "broken")
    assert "100.0% of the records are broken" in broken.stderr and not (tmp_path / "broken").exists()


def test_columns_are_aligned_also_for_wide_characters_and_marks():
    rows = [["日本", "1", "x"], ["e\u0301", "10", ""], ["abc", "2", "yy"]]
    assert inspection.table(["word", "n", "pieces"], rows) == (
        "word   n  pieces\n日本   1  x\ne\u0301     10\nabc    2  yy"
    )


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    train_tokenizer(["\x1b[31m \x1b[31m"] * 100, 300, tmp_path)
    assert any("\x1b" in load_tokenizer(tmp_path).piece(token) for token in range(300))
    output = inspect(tmp_path, "\x1b[31m", "a\nb")
    assert "\x1b" not in output and "\\x1b" in output and len(output.splitlines()) == 6


def test_output_that_cannot_show_a_piece_shows_its_number(folder):
    assert "\\u2581" in inspect(folder, "zinc", PYTHONIOENCODING="ascii")


def test_a_reader_that_leaves_early_is_no_error(folder):
    command = f"{sys.executable} -m biomedlm_jax.tokenizer inspect {folder} {'word ' * 2_000} | head -1"
    if not shutil.which("head"):
        pytest.skip("needs head")
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.startswith("text") and not result.stderr


def test_counting_reads_documents_once_in_any_order(folder):
    documents = (
        Document(text, source, None)
        for text, source in [("zinc " * 400_000, "a"), ("(zinc", "b"), (" zinc", "a"), ("azinc", "b")]
    )
    measured = inspection.measure(documents, ["zinc"], {"": load_tokenizer(folder)})
    assert measured.words == {"zinc": 2, " zinc": 400_000}
    assert {source: counts["documents"] for source, counts in measured.sources.items()} == {"a": 2, "b": 2}


@pytest.mark.slow
def test_the_five_words(shared_data, tmp_path):
    """Those that are frequent in the abstracts are single tokens; the published model's card names all five."""
    train = str(shared_data / "pile" / "train" / "*.zst")
    subprocess.run(
        [sys.executable, "-m", "biomedlm_jax.tokenizer", "train", "--input", train, "--output", str(tmp_path / "made")],
        check=True,
        cwd=ROOT,
    )
    output = inspect(tmp_path / "made", *WORDS, "--gpt2", shared_data / "gpt2", "--data", train)
    _, *rows = columns("\n".join(output.splitlines()[:11]))
    single = {row[0] for row in rows if row[2] == "1"}
    assert "' chromatography'" in single
    assert all(int(row[2]) <= int(row[5]) or row[1] == "0" for row in rows), "no more tokens than GPT-2's"
    assert not any(row[5] == "1" for row in rows), "none is GPT-2's"
