"""Texts of evaluation sets in documents, against plain Python on tuples of words."""

import csv
import gzip
import io
import json
import os
import pickle
import random
import re
import string
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import zstandard

from biomedlm_jax import contamination
from biomedlm_jax.benchmark_files import records
from biomedlm_jax.contamination import Benchmarks, read_benchmarks
from biomedlm_jax.corpus import ReadReport, expand_globs, read_documents
from biomedlm_jax.errors import UserError


def index_of(tmp_path: Path, texts: list[str]) -> Benchmarks:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return read_benchmarks([str(path)])


def numbered(first: int, end: int) -> str:
    return " ".join(f"word{i}" for i in range(first, end))


# --- The reference -----------------------------------------------------------------------------------------------


def plain_words(text: str) -> tuple[str, ...]:
    """Words by Unicode's own definitions, over the whole text."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text.replace("\u200b", " ")).casefold())
    kept = "".join(c for c in folded if unicodedata.category(c)[0] != "M" and unicodedata.category(c) != "Cf")
    return tuple(re.findall(r"[^\W_]+", kept))


def plain_runs(words: tuple[str, ...], length: int) -> set[tuple[str, ...]]:
    return {words[i : i + length] for i in range(len(words) - length + 1)}


def plain_find(texts: list[str], document: str) -> list[int]:
    """What `Benchmarks.find` is to return."""
    words = plain_words(document)
    runs = {length: plain_runs(words, length) for length in range(8, 14)}
    found = []
    for i, text in enumerate(texts):
        length = min(len(plain_words(text)), 13)
        if plain_runs(plain_words(text), length) & runs[length]:
            found.append(i)
    return found


# Few words, so that runs are often shared; each in spellings that are the same word.
SPELLINGS = [
    ["the", "The", "THE", "t\u00adhe"],
    ["naïve", "NAI\u0308VE", "naive"],
    ["β", "Β", "\u03d0"],
    ["\ufb01ne", "Fine", "ＦＩＮＥ"],
    ["10\u00b5g", "10μG", "１０μg"],
    ["a", "A"],
]
SPACES = [" ", " ", " ", ", ", "\n", "\r\n", "—", "\u00a0", "_", "-", " (", ".\t", "\0", "\u2009", "\ud800", "™ ", "“"]


def random_text(rng: random.Random, n_words: int, n_spellings: int) -> str:
    pieces = []
    for _ in range(n_words):
        pieces += [rng.choice(SPELLINGS[rng.randrange(n_spellings)]), rng.choice(SPACES)]
    return rng.choice(["", " ", "'"]) + "".join(pieces[: rng.choice([-1, len(pieces)])])


def random_case(seed: int) -> tuple[list[str], list[str]]:
    """Evaluation texts and documents, of which some hold pieces of the texts."""
    rng = random.Random(seed)
    n_spellings = rng.choice([2, 2, 3, 6])
    texts = [random_text(rng, rng.choice([8, 9, 10, 11, 12, 13, 14, 20, 40]), n_spellings) for _ in range(40)]
    documents = [random_text(rng, rng.choice([0, 1, 7, 8, 12, 13, 15, 60, 200]), n_spellings) for _ in range(60)]
    for _ in range(20):
        words = plain_words(rng.choice(texts))
        start = rng.choice([0, 0, rng.randrange(len(words))])
        piece = " ".join(words[start : start + rng.randrange(7, 16)])
        documents.append(" ".join([random_text(rng, 5, n_spellings), piece, random_text(rng, 5, n_spellings)]))
    return texts, documents


@pytest.mark.parametrize("block", [16, 64, 1 << 16])
def test_random_texts_are_found_as_by_the_reference(tmp_path, monkeypatch, block):
    monkeypatch.setattr(contamination, "_BLOCK", block)
    hits = clean = 0
    for seed in range(30):
        texts, documents = random_case(seed)
        index = index_of(tmp_path, texts)
        assert len(index.texts) == len(texts)
        expected = [plain_find(texts, document) for document in documents]
        assert index.find_all(documents) == expected
        assert [index.find(document) for document in documents] == expected
        hits += sum(map(bool, expected))
        clean += expected.count([])
    # Both outcomes were tried often.
    assert hits > 400
    assert clean > 500


@pytest.mark.parametrize("size", [8, 9, 12, 13, 14, 30])
def test_how_many_words_in_a_row(tmp_path, size):
    needed = min(size, 13)
    index = index_of(tmp_path, [numbered(0, size)])
    for n_words in range(size + 1):
        for start in {0, 1, size - n_words} & set(range(size - n_words + 1)):
            piece = numbered(start, start + n_words)
            found = [0] if n_words >= needed else []
            places = [piece, f"before {piece}", f"{piece} after", f"{numbered(100, 300)} {piece} {numbered(100, 300)}"]
            assert [index.find(place) for place in places] == [found] * 4
    half = needed // 2
    apart = f"{numbered(0, half)} else {numbered(half, needed)}"
    assert index.find(apart) == []
    # Nor is a run shared by two documents that follow each other.
    assert index.find_all([numbered(0, half), numbered(half, needed)]) == [[], []]
    assert index.find_all(["", numbered(0, size), "", numbered(0, size)]) == [[], [0], [], [0]]


def test_punctuation_case_and_line_ends_make_no_difference(tmp_path):
    text = "A 21-year-old man (previously well) has a fever of 38.5 °C; “which” drug is given, in naïve patients?"
    index = index_of(tmp_path, [text])
    for same in (
        text.upper(),
        text.lower().replace(" ", "\r\n"),
        text.translate({ord(c): " " for c in string.punctuation}),
        unicodedata.normalize("NFD", text),
        text.replace("-", "\u2010").replace("38.5 °C", "38·5 °C").replace("“", '"'),
    ):
        assert index.find(f"See: {same}!") == [0]
    for other in (text.replace("year", "years"), text.replace("fever", "fe ver"), text.replace("man", "man or woman")):
        assert index.find(" ".join(other.split()[:9])) == []


def test_every_character_is_folded_as_the_reference_folds_it():
    # One at a time, between letters; surrogates are no characters.
    for first in range(0, sys.maxunicode + 1, 4096):
        text = "".join(f"x{chr(i)}Y " for i in range(first, first + 4096))
        assert contamination._words(text).decode().replace("\0", " ").split() == list(plain_words(text))


def test_very_long_documents_and_words(tmp_path):
    index = index_of(tmp_path, [numbered(0, 20), numbered(30, 39)])
    rng = random.Random(0)
    filler = "".join(rng.choice("ab cd") for _ in range(1 << 20))
    assert index.find(filler) == []
    assert index.find(filler + " " + numbered(0, 20) + " " + filler) == [0]
    # At any place relative to the blocks in which a document is hashed.
    for gap in range(0, 160, 3):
        padding = "x" * 70 + " " * ((1 << 16) - 150 + gap)
        assert index.find_all([f"{padding} {numbered(30, 39)} y", f"{padding} {numbered(3, 16)}"]) == [[1], [0]]
    assert index.find("x" * 300_000 + " " + numbered(0, 13)) == [0]
    assert index.find(" " * 300_000) == index.find("") == []


def test_ids_are_those_of_all_texts_that_share_words(tmp_path):
    common = numbered(0, 13)
    index = index_of(tmp_path, [common, f"a {common} b", numbered(50, 58), f"{common} {common}", numbered(1, 14)])
    assert index.find(f"{numbered(50, 58)}\n\n{common}") == [0, 1, 2, 3]
    assert [index.texts[i].record for i in (0, 3)] == ["1", "4"]


def test_an_index_without_texts_finds_nothing():
    index = read_benchmarks([])
    assert index.find(numbered(0, 100)) == [] and index.texts == []


# --- The same everywhere -----------------------------------------------------------------------------------------


def test_pickled_and_in_any_order_it_is_the_same(tmp_path):
    texts, documents = random_case(0)
    index = index_of(tmp_path, texts)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.find_all(documents) == index.find_all(documents)
    assert (copy.fingerprint, copy.texts, copy.report()) == (index.fingerprint, index.texts, index.report())
    assert index_of(tmp_path, texts[::-1] + texts).fingerprint == index.fingerprint
    assert index_of(tmp_path, texts[1:]).fingerprint != index.fingerprint
    assert index_of(tmp_path, [*texts, numbered(0, 8)]).fingerprint != index.fingerprint


def test_the_hash_seed_of_a_process_makes_no_difference(tmp_path):
    texts, documents = random_case(1)
    index = index_of(tmp_path, texts)
    (tmp_path / "index").write_bytes(pickle.dumps(index))
    (tmp_path / "documents").write_bytes(pickle.dumps(documents))
    program = (
        "import pickle, sys; from biomedlm_jax.contamination import read_benchmarks; d = sys.argv[1];"
        "old = pickle.load(open(d + '/index', 'rb')); new = read_benchmarks([d + '/texts.jsonl']);"
        "documents = pickle.load(open(d + '/documents', 'rb'));"
        "print([new.fingerprint, old.find_all(documents), new.find_all(documents)])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    found = index.find_all(documents)
    assert outputs == [f"{[index.fingerprint, found, found]}\n"] * 2


def test_spaces_of_no_width_separate_words(tmp_path):
    text = "Which of the following enzymes is most likely to be deficient in this otherwise healthy child?"
    index = index_of(tmp_path, [text])
    for space in ("\u200b", "\u00a0", "\u2009", "\u3000"):
        assert index.find("And " + text.replace(" ", space)) == [0], space
    assert index.find("And " + text.replace("enzymes", "en\u00adzy\u2060mes")) == [0]


def test_a_fingerprint_is_kept_by_later_versions(tmp_path):
    """Prepared text is keyed by it: whoever changes it makes users prepare again, and says so."""
    index = index_of(tmp_path, [numbered(0, 20), "Naïve β-cells: a, b, c, d, e, f"])
    assert index.fingerprint == "52b16f73c394dc0e101c25237c510ccd1f5e527a7e7d9bab3249b1e3ecad8602"


# --- Files -------------------------------------------------------------------------------------------------------

LONG = "Which of these drugs is given to a patient with fever?"
OTHER = "The patient, who is well, has no\nhistory of such an illness."


def as_csv(rows: list[list[str]], **options) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, **options).writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=1)
    return out.getvalue()


def as_lines(values: list) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


RECORDS: list[dict] = [{"q": LONG, "n": 3, "nested": None}, {"q": "short", "nested": {"list": [["x"], [OTHER]]}}]
FILES = {
    "set.jsonl": (as_lines(RECORDS), ["1", "2"]),
    "blank.jsonl": (b"\xef\xbb\xbf\n" + as_lines(RECORDS).replace(b"\n", b"\r\n\r\n"), ["2", "4"]),
    "arrays.jsonl": (as_lines([[LONG], OTHER]), ["1", "2"]),
    "lines.json": (as_lines(RECORDS), ["1", "2"]),
    "list.json": (json.dumps(RECORDS).encode(), ["1", "2"]),
    "indented.json": (json.dumps(RECORDS, indent=1).encode(), ["1", "2"]),
    "by_id.json": (json.dumps({"17": RECORDS[0], "x4": RECORDS[1]}, indent=2).encode(), ["17", "x4"]),
    "bioasq.json": (json.dumps({"questions": RECORDS}).encode(), ["questions[0]", "questions[1]"]),
    "one.json": (json.dumps({"q": LONG, "o": OTHER}, indent=1).encode(), ["1", "1"]),
    "mmlu.csv": (as_csv([[LONG, "a", "b"], ["c", OTHER, "d"]]), ["1", "2"]),
    "multiline.csv": (as_csv([["a\nb"], [OTHER], [LONG]]), ["3", "5"]),
    "quoted.tsv": (as_csv([[LONG, "a"], ["b", OTHER]], delimiter="\t"), ["1", "2"]),
    "unquoted.tsv": (f'"{LONG}\t5" long\n"a\t{OTHER} '.replace("no\n", "no ").encode(), ["1", "2"]),
    "set.txt": (f"\n{LONG}\r\nshort\n\n{OTHER} ".replace("no\n", "no ").encode(), ["2", "5"]),
    "LIST.JSON": (json.dumps(RECORDS).encode(), ["1", "2"]),
}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", [*FILES, "set.parquet"])
def test_formats(tmp_path, name, packed):
    data, names = (as_parquet(RECORDS), ["1", "2"]) if name == "set.parquet" else FILES[name]
    path = tmp_path / (name + packed)
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packed](data))
    index = read_benchmarks([str(path)])
    assert [text.place for text in index.texts] in (
        [f"{path}:{n}" for n in names],
        [f"{path}:{n}" for n in names[::-1]],
    )
    by_text = {text.sample.strip("\" '"): i for i, text in enumerate(index.texts)}
    assert index.find(LONG) == [by_text[LONG]] and index.find(OTHER) == [by_text[OTHER.replace("\n", " ")]]
    assert index.find(LONG[:-7]) == []


def test_what_was_read_is_counted(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.csv"
    one.write_bytes(as_lines([*RECORDS, {"q": "too short", "empty": "", "only": "?!"}, {"a": LONG, "b": OTHER}]))
    two.write_bytes(as_csv([[LONG, "A"]]))
    index = read_benchmarks([str(one), str(two)])
    assert json.loads(json.dumps(index.report())) == {
        "n_words": 13,
        "min_words": 8,
        "texts": 5,
        "fingerprint": index.fingerprint,
        "files": {
            str(one): {"records": 4, "texts": 4, "too_short": 3, "records_without_texts": 1},
            str(two): {"records": 1, "texts": 1, "too_short": 1, "records_without_texts": 0},
        },
    }
    assert index.find(LONG) == [0, 2, 4]
    assert index.texts[4].place == f"{two}:1" and index.texts[4].sample == LONG


LINE = as_lines([{"q": LONG}])
BROKEN = [
    ("a.jsonl", LINE * 2 + b'{"q": \n' + LINE, ":3: not JSON"),
    ("a.jsonl", LINE + b"null\n", ":2: null is no record"),
    ("a.jsonl", LINE + b"[" * 100_000 + b"\n", ":2: not JSON"),
    ("a.jsonl", LINE + b"9" * 5000 + b"\n", ":2: not JSON"),
    ("a.jsonl", LINE + b'{"q": "caf\xe9"}\n', ":2: not UTF-8"),
    ("a.json", LINE * 3 + b"{\n", ":4: not JSON"),
    ("a.json", json.dumps([{"q": LONG}, {}], indent=1).encode()[:-3], r":\d: not JSON"),
    ("a.json", b'[\n{"q": 1},\n{"q" 1}]', ":3: not JSON"),
    ("a.csv", as_csv([[LONG, "b"]] * 4) + b'a,"b\nc\nd', ":5: unexpected end"),
    ("a.csv", as_csv([[LONG, "b"]] * 4) + b'a,"b"c\n', ":5: "),
    ("a.csv", as_csv([[LONG, "b"]] * 4) + b"a,b,c\n", ":5: 3 fields, where the first row has 2"),
    ("a.tsv", f"{LONG}\tb\nb\n".encode(), ":2: 1 fields, where the first row has 2"),
    ("a.parquet", b"PAR1 and no more", ":1: "),
    ("a.txt", LONG.encode() + b"\n\xff", ":2: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(LINE * 1000, mtime=0)[:-9], ": the archive is corrupt or truncated"),
    ("a.jsonl", as_lines([{"q": "seven words are too few to find"}]), " has no text of at least 8 words in its 1 "),
    ("a.csv", b"", " has no text of at least 8 words in its 0 records"),
    ("a.json", b"[]", " has no text of at least 8 words in its 0 records"),
    ("a.txt", "一二三四五六七八九十一二三四五六七八九十".encode(), " has no text of at least 8 words in its 1 records"),
    ("LICENSE", LONG.encode(), " is no evaluation set by its name: it must end in .parquet, .jsonl, "),
    ("a.md.gz", gzip.compress(LONG.encode(), mtime=0), " is no evaluation set by its name"),
]


@pytest.mark.parametrize("name, data, message", BROKEN)
def test_broken_files_are_named_with_the_line(tmp_path, name, data, message):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    sound, broken = tmp_path / "sound.txt", tmp_path / name
    sound.write_text(LONG)
    broken.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_benchmarks([str(sound), str(broken)])
    assert re.match(re.escape(str(broken)) + message, str(error.value))
    assert "\n" not in str(error.value)


def test_a_damaged_parquet_file_is_named(tmp_path):
    data = bytearray(as_parquet([{"q": LONG + str(i)} for i in range(20)]))
    data[4:60] = bytes(56)
    path = tmp_path / "set.parquet"
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(str(path)) + r":\d+: "):
        read_benchmarks([str(path)])


def test_a_missing_file_is_no_broken_one(tmp_path):
    with pytest.raises(UserError, match=r"set.parquet does not exist$"):
        list(records(str(tmp_path / "set.parquet")))


# --- Real samples ------------------------------------------------------------------------------------------------


def sets(shared_data: Path) -> list[str]:
    return [file for file in expand_globs([f"{shared_data}/qa/*/*"]) if "LICENSE" not in file]


def test_contexts_planted_in_abstracts_are_found(shared_data):
    pubmedqa = shared_data / "qa" / "pubmedqa"
    files = [str(pubmedqa / "dev.jsonl"), str(pubmedqa / "train.jsonl"), str(pubmedqa / "ori_pqal_train500.json")]
    index = read_benchmarks(files)
    abstracts = read_documents("pile", [str(shared_data / "pile" / "val.jsonl.zst")], ReadReport())
    clean = [document.text for document in abstracts if not index.find(document.text)][:100]
    rng = random.Random(0)
    contexts = [
        context
        for record in json.loads((pubmedqa / "ori_pqal_train500.json").read_bytes()).values()
        for context in record["CONTEXTS"]
    ]
    planted = texts = 0
    for context in contexts:
        words = rng.choice(clean).split()
        at = rng.randrange(len(words) + 1)
        document = "\n".join([" ".join(words[:at]), context.upper(), " ".join(words[at:])])
        found = index.find(document)
        if len(plain_words(context)) >= 8:
            texts += 1
            planted += any(index.texts[i].file == files[2] for i in found)
    assert len(contexts) > 1500 and planted == texts > 0.95 * len(contexts)


def test_the_question_that_a_document_quotes_is_found(shared_data):
    file = str(shared_data / "qa" / "medqa" / "dev.jsonl")
    index = read_benchmarks([file])
    questions = [json.loads(line)["sent1"] for line in Path(file).read_text().splitlines()]
    assert index.report()["files"][file]["records"] == len(questions) == 1272
    documents = [f"A case from a textbook:\n> {question[:300]} ..." for question in questions]
    for line, found in enumerate(index.find_all(documents), 1):
        assert str(line) in {index.texts[i].record for i in found}


def test_the_samples_of_the_pile_are_judged_as_by_the_reference(shared_data, capsys):
    files = sets(shared_data)
    index = read_benchmarks(files)
    texts = [text for file in files for _, record in records(file) for text in contamination._strings(record)]
    runs: set[tuple[str, ...]] = set()
    for words in map(plain_words, texts):
        if len(words) >= 8:
            runs |= plain_runs(words, min(len(words), 13))
    beginnings, sorted_runs = {run[:8] for run in runs}, sorted(runs)
    documents = [
        document.text
        for file in expand_globs([f"{shared_data}/pile/**/*.zst"])
        for document in read_documents("pile", [file], ReadReport())
    ]
    n_samples = len(documents)
    # And some with the words of an evaluation text, or all but one of them.
    rng = random.Random(0)
    for document in documents[::10]:
        run = rng.choice(sorted_runs)
        documents.append(f"{document[:500]} {' '.join(run[rng.choice([0, 1]) :])} {document[500:]}")
    expected = []
    for words in map(plain_words, documents):
        starts = [i for i in range(len(words)) if words[i : i + 8] in beginnings]
        expected.append(any(words[i : i + length] in runs for i in starts for length in range(8, 14)))
    found = index.find_all(documents)
    assert [bool(ids) for ids in found] == expected
    assert 100 < sum(expected[n_samples:]) < 300
    with capsys.disabled():
        print(f"\n{sum(expected[:n_samples])} of {n_samples} documents share 13 words with the evaluation sets")
