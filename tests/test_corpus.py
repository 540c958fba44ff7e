"""Readers of raw text: what is kept, what is counted, and what breaks."""

import bz2
import gzip
import itertools
import json
import lzma
import random
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from biomedlm_jax import corpus
from biomedlm_jax.corpus import Document, ReadReport, Selection, expand_globs, read_documents
from biomedlm_jax.errors import UserError

ABSTRACTS, CENTRAL = corpus.PUBMED_SETS
PILE_SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "pile"


def pile_line(text: object, name: object = ABSTRACTS) -> bytes:
    return json.dumps({"text": text, "meta": {"pile_set_name": name}}).encode() + b"\n"


def zstd(data: bytes, checksum: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum).compress(data)


def zstd_stream(data: bytes) -> bytes:
    """As a pipe writes it: without the content's size in the header."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


def read(path: Path, data: bytes, source: str = "pile") -> tuple[list[Document], ReadReport]:
    path.write_bytes(data)
    report = ReadReport()
    return list(read_documents(source, [str(path)], report)), report


TEXTS = [f"Title {i}\nAbstract of document {i}: \u03b2-blockers, \x00 and \U0001f9ec." for i in range(200)]
LINES = b"".join(map(pile_line, TEXTS))
ARCHIVES = {
    "plain": LINES,
    "gzip": gzip.compress(LINES),
    "gzip members": gzip.compress(LINES[:5000]) + gzip.compress(LINES[5000:]),
    "zstd": zstd(LINES),
    "zstd stream": zstd_stream(LINES),
    "zstd frames": zstd(LINES[:5000]) + zstd(b"") + zstd(LINES[5000:]),
    "zstd after a skippable frame": b"\x5a\x2a\x4d\x18\x04\0\0\0abcd" + zstd(LINES),
}


@pytest.mark.parametrize("name", ["shard.jsonl", "shard.gz", "shard.zst"])
@pytest.mark.parametrize("archive", ARCHIVES)
def test_content_tells_the_compression_and_texts_are_exact(tmp_path, archive, name):
    documents, report = read(tmp_path / name, ARCHIVES[archive])
    assert documents == [Document(text, ABSTRACTS) for text in TEXTS]
    assert report == ReadReport(documents=200, bytes=sum(len(text.encode()) for text in TEXTS))


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64])
@pytest.mark.parametrize("archive", ARCHIVES)
def test_chunks_may_end_anywhere(tmp_path, monkeypatch, archive, chunk_bytes):
    monkeypatch.setattr(corpus.files, "CHUNK_BYTES", chunk_bytes)
    documents, _ = read(tmp_path / "shard", ARCHIVES[archive])
    assert [document.text for document in documents] == TEXTS


def test_windows_and_lines_may_be_large(tmp_path):
    text = "".join(map(str, range(3_000_000)))
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(pile_line(text)) + compressor.flush()
    with pytest.raises(zstandard.ZstdError):  # zstd's default limit refuses it
        zstandard.ZstdDecompressor().decompressobj().decompress(data)
    documents, _ = read(tmp_path / "shard.zst", data)
    assert documents[0].text == text


@pytest.mark.parametrize(
    "data",
    [LINES.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + LINES, LINES.rstrip(b"\n"), LINES.replace(b"\n", b"\n \r\n\n")],
    ids=["CRLF", "BOM", "no last newline", "blank"],
)
def test_line_ends_and_byte_order_mark(tmp_path, data):
    documents, report = read(tmp_path / "shard.jsonl", data)
    assert [document.text for document in documents] == TEXTS
    assert not report.dropped


BAD_LINES = [
    (b"{'text': 1}", "not JSON"),
    (b'{"text": "a", "meta"', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"9" * 5000, "not JSON"),
    (b"\0", "not JSON"),
    (b"null", "no text"),
    (b'"text"', "no text"),
    (b'["text", "meta"]', "no text"),
    (b'{"meta": {"pile_set_name": "PubMed Central"}}', "no text"),
    (b'{"text": "a"}', "no set name"),
    (b'{"text": "a", "meta": null}', "no set name"),
    (b'{"text": "a", "meta": "PubMed Central"}', "no set name"),
    (b'{"text": "a", "meta": {}}', "no set name"),
    (b'{"text": "a", "meta": {"pile_set_name": ["PubMed Central"]}}', "no set name"),
    (pile_line(None).strip(), "no text"),
    (pile_line(["a"]).strip(), "no text"),
    (pile_line("").strip(), "empty"),
    (pile_line(" \n\t\u00a0").strip(), "empty"),
    (pile_line("a", "Github").strip(), "another set"),
    (b'{"text": "caf\xe9", "meta": {"pile_set_name": "PubMed Central"}}', "invalid UTF-8"),
    (b'{"text": "\xed\xa0\x80", "meta": {"pile_set_name": "PubMed Central"}}', "invalid UTF-8"),
    (pile_line("a").decode().strip().encode("utf-16"), "invalid UTF-8"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_a_bad_line_is_counted_by_its_reason_and_skipped(tmp_path, line, reason):
    path = tmp_path / "shard.jsonl"
    documents, report = read(path, pile_line("first") + line + b"\n" + pile_line("last", CENTRAL))
    assert documents == [Document("first", ABSTRACTS), Document("last", CENTRAL)]
    assert report.dropped == Counter({reason: 1})
    assert report.samples == {reason: [f"{path}:2"]}
    assert report.bad_fraction == (0 if reason in ("empty", "another set") else 1 / 3)


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"content": "a"}', "no text at .*:1 \\(text_field names the key of the text\\)"),
        (b'{"text": "a"}', "no set name at .*:1 \\(an empty pile_sets keeps records"),
        (b"{", "not JSON at .*:1 \\(each line must be one JSON object\\)"),
    ],
)
def test_text_in_another_form_is_refused_with_what_would_help(tmp_path, line, message):
    """By the most frequent reason."""
    _, report = read(tmp_path / "shard.jsonl", (line + b"\n") * 3 + b"\xff\n")
    with pytest.raises(UserError, match=f"^100.0% of the records are broken, more than the 1.0% allowed; .*{message}"):
        report.check(0.01)


def test_the_report_of_many_files(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_bytes(pile_line("kept") + b"{\n" * 2 + pile_line("a", "Github") + b"7\n")
    report = ReadReport()
    assert len(list(read_documents("pile", [str(path) for path in paths], report))) == 2
    assert report.dropped == {"not JSON": 4, "another set": 2, "no text": 2}
    assert report.bad_fraction == 6 / 10
    assert report.samples["not JSON"] == [f"{paths[0]}:2", f"{paths[0]}:3", f"{paths[1]}:2"]
    assert json.loads(json.dumps(report.as_dict())) == {
        "documents": 2,
        "bytes": 8,
        "dropped": {"not JSON": 4, "another set": 2, "no text": 2},
        "replaced_surrogates": 0,
        "bad_fraction": 0.6,
        "samples": report.samples,
    }
    assert ReadReport().bad_fraction == 0


def test_sets_are_chosen(tmp_path):
    path = tmp_path / "shard.jsonl"
    path.write_bytes(pile_line("a") + pile_line("b", "Github"))
    report = ReadReport()
    assert list(read_documents("pile", [str(path)], report, Selection(pile_sets=("Github",)))) == [
        Document("b", "Github")
    ]
    assert report.dropped == {"another set": 1}


def test_every_record_with_text_is_kept_if_no_set_is_named(tmp_path):
    path = tmp_path / "shard.jsonl"
    path.write_bytes(pile_line("a", "Github") + b'{"body": "b"}\n{"text": "c"}\n{"text": "d", "meta": "e"}\n')
    report = ReadReport()
    documents = list(read_documents("pile", [str(path)], report, Selection(pile_sets=())))
    assert documents == [Document("a", "Github"), Document("c", "json"), Document("d", "json")]
    assert report.samples == {"no text": [f"{path}:2"]}
    assert [
        document.text for document in read_documents("pile", [str(path)], report, Selection((), text_field="body"))
    ] == ["b"]


def test_lone_surrogates_are_replaced_and_pairs_are_kept(tmp_path):
    line = rb'{"text": "a\ud800b\udc00\ud83d\ude00\udc00\ud83d", "meta": {"pile_set_name": "PubMed Central"}}'
    documents, report = read(tmp_path / "shard.jsonl", line)
    assert documents == [Document("a\ufffdb\ufffd\U0001f600\ufffd\ufffd", CENTRAL)]
    assert report.replaced_surrogates == 4
    assert report.bytes == len(documents[0].text.encode()) == 2 + 4 * 3 + 4


# --- Broken archives ---------------------------------------------------------------------------------------------

WHOLE = ["gzip", "gzip members", "zstd", "zstd stream", "zstd frames"]


@pytest.mark.parametrize("archive", WHOLE)
def test_a_truncated_archive_is_named(tmp_path, archive):
    data = ARCHIVES[archive]
    # Between two members nothing is missing that a reader could know of.
    joints = {len(gzip.compress(LINES[:5000])), len(zstd(LINES[:5000])), len(zstd(LINES[:5000]) + zstd(b""))}
    cuts = {0, *range(4, 20), *range(4, len(data), 97), *range(len(data) - 12, len(data))}
    for cut in sorted(cuts - joints):
        with pytest.raises(UserError, match="shard.zst"):
            read(tmp_path / "shard.zst", data[:cut])


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("archive", WHOLE)
def test_less_than_a_magic_number_is_an_error_or_counted(tmp_path, archive, cut):
    try:
        documents, report = read(tmp_path / "shard.zst", ARCHIVES[archive][:cut])
    except UserError:
        return
    assert not documents and report.bad_fraction == 1


def test_the_error_names_the_line_and_the_documents_before_it_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.files, "CHUNK_BYTES", 256)
    random_texts = [random.Random(i).randbytes(300).hex() for i in range(100)]
    path = tmp_path / "shard.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(map(pile_line, random_texts)))[:-2000])
    report = ReadReport()
    documents = read_documents("pile", [str(path)], report)
    with pytest.raises(UserError) as error:
        for document, text in zip(documents, random_texts, strict=True):
            assert document.text == text
    assert str(path) in str(error.value) and f"after line {report.documents} " in str(error.value)
    assert 80 < report.documents < 100


@pytest.mark.parametrize("archive", WHOLE[:2] + ["zstd", "zstd frames"])
def test_corruption_is_an_error_or_harmless(tmp_path, archive):
    data = ARCHIVES[archive]
    draw = random.Random(archive)
    errors = 0
    for trial in range(300):
        broken = bytearray(data)
        # The first bytes matter most: magic numbers and headers.
        at = trial if trial < 20 else draw.randrange(len(data))
        broken[at] ^= draw.randrange(1, 256)
        try:
            documents, report = read(tmp_path / "shard.zst", bytes(broken))
        except UserError as error:
            assert "shard.zst" in str(error)
            errors += 1
        else:
            # Harmless (a time stamp in the header), or no archive any more and counted as garbage.
            assert [document.text for document in documents] == TEXTS and not report.dropped or report.bad_fraction == 1
    assert errors > 250


def test_an_empty_archive_is_an_error_and_an_empty_text_file_is_not(tmp_path):
    for name in ("a.gz", "a.zst"):
        with pytest.raises(UserError, match="empty"):
            read(tmp_path / name, b"")
    assert read(tmp_path / "a.jsonl", b"") == ([], ReadReport())
    assert read(tmp_path / "b.zst", zstd(b"")) == ([], ReadReport())


# --- Plain text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd, zstd_stream])
def test_a_text_file_is_one_document(tmp_path, pack):
    text = "One.\r\n\r\nTwo.\n\n\x0cThree\x00.  \n"
    documents, report = read(tmp_path / "a.txt", pack(text.encode("utf-8-sig")), "text")
    assert documents == [Document(text, "text")]
    assert report == ReadReport(documents=1, bytes=len(text.encode()))


@pytest.mark.parametrize(
    "data, reason, line", [(b"", "empty", 1), (b" \n\n", "empty", 1), (b"one\ntwo\n\xff\n", "invalid UTF-8", 3)]
)
def test_text_files_left_out(tmp_path, data, reason, line):
    documents, report = read(tmp_path / "a.txt", data, "text")
    assert not documents
    assert report.samples == {reason: [f"{tmp_path / 'a.txt'}:{line}"]} and report.dropped == {reason: 1}


def test_a_truncated_text_archive_is_named(tmp_path):
    with pytest.raises(UserError, match="a.txt.gz"):
        read(tmp_path / "a.txt.gz", gzip.compress(b"text")[:-1], "text")


def test_an_unknown_source_is_an_error_at_once():
    with pytest.raises(UserError, match="'csv' is no format of text files: write one of pile, parquet, pubmed_xml"):
        read_documents("csv", [], ReadReport())


# --- Files -------------------------------------------------------------------------------------------------------


def test_globs(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "[1].txt", "1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert expand_globs(["b.txt", "a.txt"]) == ["a.txt", "b.txt"]
    assert expand_globs(["[ab].*", "a*", "b.txt"]) == ["a.txt", "b.txt"]
    assert expand_globs(["**/c.txt"]) == ["deep/er/c.txt"]
    assert expand_globs(["[1].txt"]) == ["[1].txt"]
    assert expand_globs([f"{tmp_path}/deep/*/*"]) == [f"{tmp_path}/deep/er/c.txt"]
    assert expand_globs([]) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_globs(["~/a.*"]) == [f"{tmp_path}/a.txt"]


@pytest.mark.parametrize(
    "patterns, missing",
    [(["a.txt", "no*.txt"], r"no\*.txt"), (["deep"], r"deep.*deep/\*"), (["deep/*/"], "deep"), ([""], "''")],
)
def test_a_glob_without_files_is_named_with_the_folder(tmp_path, monkeypatch, patterns, missing):
    (tmp_path / "a.txt").touch()
    (tmp_path / "deep/er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=missing) as error:
        expand_globs(patterns)
    assert "folder" in str(error.value)


def test_each_file_is_read_once_whatever_its_names(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.txt").touch()
    (tmp_path / "deep/loop").symlink_to(tmp_path)
    (tmp_path / "a.txt").symlink_to("deep/b.txt")
    monkeypatch.chdir(tmp_path)
    assert expand_globs(["a.txt", "deep/b.txt", "./a.txt", str(tmp_path / "a.txt")]) == ["a.txt"]
    assert expand_globs(["**/b.txt", "**/*.txt"]) == ["a.txt"]


def test_a_link_to_nothing_is_an_error(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").symlink_to("gone")
    with pytest.raises(
        UserError, match=r"b.txt, which .*\*.txt' matches, is no file \(perhaps a link to one that is gone"
    ):
        expand_globs([str(tmp_path / "*.txt")])


@pytest.mark.parametrize(
    "kind, data",
    [
        ("xz", lzma.compress(b"text")),
        ("bzip2", bz2.compress(b"text")),
        ("zip", b"PK\3\4\x14\0\0\0"),
        ("lz4", b"\x04\x22\x4d\x18\x64\x40"),
    ],
)
@pytest.mark.parametrize("source", ["pile", "text", "pubmed_xml", "jats_xml"])
def test_other_archives_are_named(tmp_path, source, kind, data):
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"a is a {kind} archive, which is not read: unpack it"):
        list(read_documents(source, [str(path)], ReadReport()))


@pytest.mark.parametrize("chunk_bytes", [5, 1 << 17])
def test_zeros_behind_a_gzip_archive_are_passed_over(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(corpus.files, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"one ") + bytes(1000) + gzip.compress(b"two") + bytes(300_000))
    assert [document.text for document in read_documents("text", [str(path)], ReadReport())] == ["one two"]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="the archive is corrupt"):
        list(read_documents("text", [str(path)], ReadReport()))


# --- Anything at all ---------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
NAMES = st.sampled_from([ABSTRACTS, CENTRAL, "Github"])
RECORDS = (
    st.fixed_dictionaries(
        {},
        optional={
            "text": st.text() | JSON,
            "meta": st.one_of(JSON, st.fixed_dictionaries({"pile_set_name": NAMES | JSON})),
        },
    )
    | JSON
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        RECORDS.map(lambda record: json.dumps(record).encode())
        | st.binary().map(lambda data: data.replace(b"\n", b"\r")),
        max_size=8,
    ),
    st.sampled_from([bytes, gzip.compress, zstd_stream]),
)
def test_every_line_is_kept_or_counted(tmp_path, lines, pack):
    data = b"\n".join(lines)
    if pack is bytes:
        data = b"\n" + data  # else the bytes drawn may begin as an archive does
    documents, report = read(tmp_path / "shard", pack(data))
    records = sum(bool(line.strip()) for line in lines)
    assert report.documents == len(documents)
    assert report.documents + report.dropped.total() == records
    assert report.bytes == sum(len(document.text.encode()) for document in documents)
    assert set(report.dropped) == set(report.samples)
    assert all(document.source in corpus.PUBMED_SETS and document.text.strip() for document in documents)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=()), min_size=1), max_size=8), st.booleans())
def test_texts_come_back_exactly(tmp_path, texts, ascii_only):
    texts = [text for text in texts if text.strip()]
    surrogates = sum("\ud800" <= letter <= "\udfff" for text in texts for letter in text)
    if surrogates:
        # Neighbours may form a pair, which JSON reads as one letter: only counts are compared.
        ascii_only = True
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": CENTRAL}}, ensure_ascii=ascii_only) for text in texts]
    documents, report = read(tmp_path / "shard", "\n".join(lines).encode())
    assert report.documents == len(texts) and report.replaced_surrogates <= surrogates
    if not surrogates:
        assert [document.text for document in documents] == texts


# --- Real data ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PILE_SAMPLE.is_dir(), reason="no sample of The Pile beside the checkout (../shared/data/pile)")
def test_the_real_sample():
    files = expand_globs([f"{PILE_SAMPLE}/**/*.jsonl.zst"])
    report = ReadReport()
    documents = list(read_documents("pile", files, report))
    assert Counter(document.source for document in documents) == {ABSTRACTS: 3615, CENTRAL: 85}
    assert report.dropped == {"another set": 6} and report.documents + report.dropped.total() == 3706

    whole = (zstandard.ZstdDecompressor().decompressobj().decompress(Path(file).read_bytes()) for file in files)
    records = map(json.loads, itertools.chain.from_iterable(data.splitlines() for data in whole))
    kept = [record for record in records if record["meta"]["pile_set_name"] != "Github"]
    assert [document.text for document in documents] == [record["text"] for record in kept]
    assert report.bytes == sum(len(record["text"].encode()) for record in kept)
