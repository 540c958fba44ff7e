"""Thousands of corrupted inputs: each is read with all that is lost counted, or ends with one line that names it."""

import functools
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_corpus_formats import ARTICLE, BOMB, HEAD, XML, abstract_of, plain, record, tar_of

from biomedlm_jax.corpus import ReadReport, Selection, read_documents, read_mixed
from biomedlm_jax.errors import UserError

MAX_MEGABYTES = 300


def parquet_of(texts):
    data = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), data, row_group_size=7)
    return data.getvalue()


TEXTS = [f"Document {index} on \u03b2-blockers {'and more ' * index}" for index in range(20)]
WRONG = [None, 7, [], {}, {"text": 1}, {"text": None}, [{"text": "a"}], "text", {"Text": "a"}, {"text": ["a"]}]
LINES = [json.dumps({"text": text, "meta": {"pile_set_name": "PubMed Central"}}) for text in TEXTS]
TARS = [
    tar_of([(name, ARTICLE.encode()) for name in ("a.xml", "../../b.xml", "/c.nxml", "d\n\x1b[2J.xml", "e.txt")]),
    tar_of([("a.xml", (BOMB + "]><article>&j;</article>").encode()), ("b.xml", b""), ("c.xml", ARTICLE.encode())]),
]
WHOLE = {
    "pile": ["\n".join(LINES).encode(), "\n".join(LINES + list(map(json.dumps, WRONG))).encode()],
    "text": ["\n".join(TEXTS).encode()],
    "pubmed_xml": [XML, (BOMB + "]>").encode() + XML],
    "jats_xml": [ARTICLE.encode(), (BOMB + "]><article>&j;</article>").encode(), *TARS],
    "parquet": [parquet_of(TEXTS)],
}
PIECES = [
    *(b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"\r\n\r\n", b'"', b"{", b"[" * 50_000, b"9" * 5000, b"\\ud800"),
    *(b"<![CDATA[", b"]]>", b"<!--", b"&a;", b"&#0;", b"</PubmedArticle>", b"<PubmedArticle>", b"<DeleteCitation>"),
    *(b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PAR1", b"ustar", bytes(1024), b"</p>", b"<p>" * 10_000),
    b'<!DOCTYPE a [<!ENTITY a "b">]>',
]


def damage(data, rng):
    """A small accident."""
    at, size = rng.randrange(len(data) + 1), rng.choice([1, 3, 50, 1000])
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(size) + data[at + size :]
    if kind == 2:
        return data[:at] + rng.choice(PIECES) + data[at:]
    if kind == 3:
        return data[:at] + data[at + size :]
    if kind == 4:
        return data[:at] + data[max(0, at - size) :]
    return data + rng.choice([data, b"\n" + data, data[:at], rng.choice(PIECES)])


def corrupted(rng):
    """A source and what may be in one of its files."""
    source = rng.choice(list(WHOLE))
    data = rng.choice(WHOLE[source] if rng.random() < 0.95 else rng.choice(list(WHOLE.values())))
    for _ in range(rng.choice([0, 1, 1, 2])):
        data = damage(data, rng)
    pack = rng.choice([bytes, functools.partial(gzip.compress, mtime=0), zstandard.compress])
    data = pack(data) if rng.random() < 0.9 else pack(data[: len(data) // 2]) + pack(data[len(data) // 2 :])
    return source, damage(data, rng) if rng.random() < 0.4 else data, pack is bytes


def fuzz(folder, count, seed):
    """Reads corrupted files; how many were read and how many refused, and the megabytes it took.

    Raises:
      AssertionError: something went wrong otherwise; the file is left.
    """
    outcomes = {"read": 0, "refused": 0, "dropped": 0}
    rng = random.Random(seed)
    for index in range(count):
        source, data, plain = corrupted(rng)
        path = folder / rng.choice(["a.jsonl", "b.xml.gz", "c\n\x1b[31m.zst", "d.parquet", "e"])
        path.write_bytes(data)
        selection = Selection(pile_sets=rng.choice([(), ("PubMed Central",)]), languages=rng.choice([(), ("eng",)]))
        report = ReadReport()
        try:
            if rng.random() < 0.8:
                documents = list(read_documents(source, [str(path)], report, selection))
            else:
                source, documents = "mixed", list(read_mixed([str(path)], report, selection))
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 2000 and path.name[0] in str(error), (index, error)
            outcomes["refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"{index}: {source} {path}: {error!r}") from error
        assert len(documents) == report.documents, index
        assert sum(len(document.text.encode()) for document in documents) == report.bytes, index
        assert all(map(str.isprintable, sum(report.samples.values(), []))), index
        seen = report.documents + report.dropped.total()
        if source == "pile" and plain and not data.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
            assert seen == sum(bool(line.strip()) for line in data.split(b"\n")), index
        elif source not in ("pile", "parquet", "mixed"):
            assert seen, index
        outcomes["read"] += 1
        outcomes["dropped"] += report.dropped.total()
    return outcomes


def run(folder, call):
    """A call of this file in a process of its own: its result, and its peak memory in megabytes."""
    code = (
        f"import json, re, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_corpus_fuzz as fuzz; "
        f"from pathlib import Path; result = fuzz.{call}; "
        "print(json.dumps([result, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_5000_corrupted_inputs(tmp_path):
    count = 5000
    outcomes, megabytes = run(tmp_path, f"fuzz(Path(sys.argv[1]), {count}, seed=0)")
    print(outcomes, megabytes, "MB")
    assert outcomes["read"] + outcomes["refused"] == count and megabytes < MAX_MEGABYTES
    assert min(outcomes.values()) > count / 5


def numbered(source, rng):
    """Content of some records, each of them sound or damaged within itself, and how many they are."""
    count = rng.randrange(1, 40)
    if source == "pile":
        records = [
            json.dumps({"text": f"Text {n}.", "meta": {"pile_set_name": "PubMed Central"}}) for n in range(count)
        ]
        return b"\n".join(hurt(record.encode(), rng, b"\n") for record in records), count
    if source == "parquet":
        texts = [hurt(f"Text {n}.".encode(), rng, b"") if rng.random() < 0.9 else None for n in range(count)]
        data = io.BytesIO()
        pq.write_table(pa.table({"text": pa.array(texts, pa.binary())}), data, row_group_size=rng.randrange(1, 20))
        return data.getvalue(), count
    if source == "pubmed_xml":
        records = [record(n, abstract_of(plain(f"Text {n}."))).encode() for n in range(1, count + 1)]
        for n, whole in enumerate(records):
            begin, inner, end = re.fullmatch(rb"(<PubmedArticle>)(.*)(</PubmedArticle>\n)", whole, re.DOTALL).groups()
            # Of neighbors at most one lacks its begin or its end.
            if n % 2 and rng.random() < 0.2:
                begin, end = rng.choice([(b"<PubmfdArticle>", end), (begin, b"\n")])
            records[n] = begin + hurt(inner, rng, b"<>") + end
        return HEAD.encode() + b"".join(records) + b"</PubmedArticleSet>", count
    articles = [hurt(ARTICLE.encode(), rng, b"<>") for _ in range(count)]
    if rng.random() < 0.5:
        names = [rng.choice(["a.xml", "../b.nxml", "c.jpg", "d\n.xml"]) for _ in articles]
        return tar_of(list(zip(names, articles, strict=True))), count
    # A collection is one document of XML: only what leaves it well-formed costs single articles.
    sound = ARTICLE[ARTICLE.index("<article ") :].encode()
    articles = [rng.choice([sound, b"<article/>", sound.replace(b'"en"', b'"de"')]) for _ in range(count)]
    return b"<pmc-articleset>" + b"\n".join(articles) + b"</pmc-articleset>", count


def hurt(data, rng, structure):
    """The same, or with other bytes in it, none of which makes or ends a record."""
    data = bytearray(data)
    for _ in range(rng.choice([0, 0, 1, 5])):
        at = rng.randrange(len(data))
        if data[at] not in structure:
            other = rng.randrange(256)
            data[at] = data[at] if other in structure else other
    return bytes(data)


@pytest.mark.parametrize("source", ["pile", "parquet", "pubmed_xml", "jats_xml"])
def test_no_record_is_lost_uncounted(tmp_path, source):
    """As many as were written, not as many as the reader saw."""
    path, rng, broken = tmp_path / "a", random.Random(1), 0
    for index in range(500):
        data, count = numbered(source, rng)
        pack = bytes if source == "parquet" else rng.choice([bytes, gzip.compress, zstandard.compress])
        path.write_bytes(pack(data))
        report = ReadReport()
        selection = Selection(pile_sets=(), languages=rng.choice([(), ("eng",)]))
        documents = list(read_documents(source, [str(path)], report, selection))
        assert len(documents) == report.documents
        assert report.documents + report.dropped.total() == count, index
        broken += report.dropped.total()
    assert broken > 500


def read_huge(path, source):
    report = ReadReport()
    try:
        sizes = [len(document.text) for document in read_documents(source, [path], report, Selection((), languages=()))]
    except UserError as error:
        return str(error)
    return [sizes, report.dropped, report.samples]


HUGE = {
    "pile": (LINES[0].encode() + b'\n{"text": "', b'"}\n' + LINES[1].encode()),
    "text": (b"before\n", b"\nafter\n"),
    "pubmed_xml": (XML.split(b"One.")[0], b"One." + XML.split(b"One.")[1]),
    "jats_xml": (b"<article><body><p>", b"</p></body></article>"),
}


@pytest.mark.parametrize("source", HUGE)
def test_a_line_of_a_gigabyte_is_counted_and_its_neighbors_are_read(tmp_path, source):
    path = tmp_path / "huge.zst"
    before, after = HUGE[source]
    with zstandard.open(path, "wb") as file:
        file.write(before)
        for _ in range(1 << 10):
            file.write(b"a" * (1 << 20))
        file.write(after)
    (sizes, dropped, samples), megabytes = run(tmp_path, f"read_huge({str(path)!r}, {source!r})")
    expected = {"pile": [len(TEXTS[0]), len(TEXTS[1])], "text": [7, 6], "pubmed_xml": 4 * [None], "jats_xml": []}
    assert len(sizes) == len(expected[source]) and dropped["too long"] == 1
    assert source == "pubmed_xml" or sizes == expected[source]
    assert samples["too long"][0].startswith(f"{path}:") and megabytes < MAX_MEGABYTES


def test_a_member_of_a_gigabyte_is_counted_and_the_next_is_read(tmp_path):
    path = tmp_path / "huge.tar.zst"
    member = tarfile.TarInfo("huge.xml")
    member.size = 1 << 30
    with zstandard.open(path, "wb") as file:
        file.write(member.tobuf())
        for _ in range(1 << 10):
            file.write(bytes(1 << 20))
        file.write(tar_of([("a.xml", ARTICLE.encode())]))
    (sizes, dropped, _), megabytes = run(tmp_path, f"read_huge({str(path)!r}, 'jats_xml')")
    assert len(sizes) == 1 and dropped == {"too long": 1} and megabytes < MAX_MEGABYTES
