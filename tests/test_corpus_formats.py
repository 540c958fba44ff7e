"""Parquet, PubMed XML, JATS, URLs and The Pile's TFDS builder, against plain statements of what they hold."""

import contextlib
import functools
import gzip
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
from collections import Counter

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from biomedlm_jax import corpus
from biomedlm_jax.corpus import Document, ReadReport, Selection, read_documents, read_mixed
from biomedlm_jax.errors import UserError

EVERYTHING = Selection(pile_sets=(), languages=())


def read(source, path, selection=EVERYTHING):
    report = ReadReport()
    return list(read_documents(source, [str(path)], report, selection)), report


# --- Parquet -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_rows_in_their_order(tmp_path, kind):
    texts = [f"Text {index} of \u03b2-blockers" for index in range(1000)]
    table = pa.table({"id": range(1000), "text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300, compression="zstd")
    documents, report = read("parquet", tmp_path / "a.parquet")
    assert documents == [Document(text, "parquet") for text in texts]
    assert report == ReadReport(documents=1000, bytes=sum(len(text.encode()) for text in texts))
    assert report.raw_bytes == pytest.approx((tmp_path / "a.parquet").stat().st_size, rel=0.01)


def test_parquet_rows_left_out_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.files, "MAX_RECORD_BYTES", 100)
    values = [b"one", None, b"", b"\xff", b"x" * 101, b"two"]
    data = pa.array(values, pa.binary())
    pq.write_table(pa.table({"body": data}), tmp_path / "a.parquet")
    documents, report = read("parquet", tmp_path / "a.parquet", Selection((), "body"))
    assert [document.text for document in documents] == ["one", "two"]
    assert report.dropped == {"empty": 2, "invalid UTF-8": 1, "too long": 1}
    assert report.samples["invalid UTF-8"] == [f"{tmp_path / 'a.parquet'}:row 4"]


@pytest.mark.parametrize("form", [lambda meta: meta, json.dumps], ids=["struct", "json"])
def test_parquet_of_the_pile_is_selected_by_set(tmp_path, form):
    metas = [{"pile_set_name": name} for name in ("PubMed Central", "Github", "PubMed Abstracts")]
    table = pa.table({"text": ["a", "b", "c"], "meta": pa.array(list(map(form, metas)))})
    pq.write_table(table, tmp_path / "a.parquet")
    documents, report = read("parquet", tmp_path / "a.parquet", Selection())
    assert documents == [Document("a", "PubMed Central"), Document("c", "PubMed Abstracts")]
    assert report.dropped == {"another set": 1}


def test_parquet_mistakes_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"], "number": [1]}), path)
    for selection, message in [
        (EVERYTHING, "a.parquet has no column 'text' but content, number: set data.text_field to one of them"),
        (Selection((), "number"), "a.parquet: the column 'number' holds no text but int64"),
        (Selection(text_field="content"), r"has no column 'meta' .* set data.pile_sets to \[\] to keep every row"),
    ]:
        with pytest.raises(UserError, match=message):
            read("parquet", path, selection)
    whole = path.read_bytes()
    for broken in (b"", whole[:-5], whole[: len(whole) // 2], b"PAR1" + bytes(100)):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="a.parquet: the Parquet file is damaged or cut short"):
            read("parquet", path)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_parquet_file_in_an_archive_is_refused_as_such(tmp_path, pack):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(pack((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(UserError, match="a.parquet.gz is a Parquet file in an archive: unpack it"):
        list(read_mixed([str(path)], ReadReport()))


def test_parquet_memory_is_that_of_some_rows(tmp_path):
    """A gigabyte of text in one row group."""
    writer = pq.ParquetWriter(tmp_path / "a.parquet", pa.schema({"text": pa.string()}), compression="zstd")
    with writer:
        writer.write_table(pa.table({"text": ["immunology " * 1000] * 90_000}), row_group_size=90_000)
    code = (
        "import re, sys; from biomedlm_jax import corpus; report = corpus.ReadReport(); "
        "documents = corpus.read_documents('parquet', sys.argv[1:], report, corpus.Selection(pile_sets=())); "
        "print(sum(len(document.text) for document in documents), "
        "re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.parquet")], check=True, capture_output=True)
    size, kibibytes = map(int, said.stdout.split())
    assert size == 11_000 * 90_000 and kibibytes < 500 << 10


# --- PubMed XML --------------------------------------------------------------------------------------------------

HEAD = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January 2026//EN" "https://dtd.nlm.nih.gov/ncbi/x.dtd">
<PubmedArticleSet>
"""


def record(pmid, abstract, title="A title.", version=1, language="eng", extra=""):
    return f"""<PubmedArticle>
  <MedlineCitation Status="MEDLINE" Owner="NLM">
    <PMID Version="{version}">{pmid}</PMID>
    <Article PubModel="Print">
      <ArticleTitle>{title}</ArticleTitle>
      {abstract}
      <Language>{language}</Language>
    </Article>
    {extra}
  </MedlineCitation>
  <PubmedData><ReferenceList><Reference><ArticleIdList><ArticleId IdType="pubmed">999</ArticleId></ArticleIdList>
  </Reference></ReferenceList></PubmedData>
</PubmedArticle>
"""


def abstract_of(*sections, after=""):
    return f"<Abstract>{''.join(sections)}{after}</Abstract>"


def plain(text):
    return f"<AbstractText>{text}</AbstractText>"


RECORDS = [
    record(1, abstract_of(plain("One."))),
    record(
        2,
        abstract_of(
            '<AbstractText Label="BACKGROUND" NlmCategory="BACKGROUND">Why\n  not.</AbstractText>',
            '<AbstractText Label="UNLABELLED">No label.</AbstractText>',
            '<AbstractText Label="RESULTS">H<sub>2</sub>O &lt; 5&#x2009;&#181;m, <i>n</i> = 3.</AbstractText>',
            '<AbstractText Label="EMPTY"></AbstractText>',
            after="<CopyrightInformation>Copyright 2026 Nobody.</CopyrightInformation>",
        ),
        title="[On <b>water</b>.]",
        version=3,
    ),
    record(3, ""),
    record(4, abstract_of(plain("Nein.")), language="ger"),
    record(5, abstract_of(plain("Five.")), extra="<OtherAbstract><AbstractText>Cinq.</AbstractText></OtherAbstract>"),
    '<PubmedBookArticle><BookDocument><PMID Version="1">6</PMID></BookDocument></PubmedBookArticle>\n',
    record(7, abstract_of(plain("Broken &amp and lost."))),
    record("seven", abstract_of(plain("No number."))),
    record(8, abstract_of(plain(" \n ")), title=""),
    record(9, abstract_of(plain("Nine &amp; last.")), title=""),
]
DELETED = '<DeleteCitation><PMID Version="1">11</PMID>\n<PMID Version="1">12</PMID></DeleteCitation>\n'
EXPECTED = [
    Document("A title.\nOne.", "PubMed Abstracts", 1, 1),
    Document(
        "[On water.]\nBACKGROUND: Why not.\nNo label.\nRESULTS: H2O < 5 \u00b5m, n = 3.", "PubMed Abstracts", 2, 3
    ),
    Document("A title.\nFive.", "PubMed Abstracts", 5, 1),
    Document("Nine & last.", "PubMed Abstracts", 9, 1),
]
XML = (HEAD + "".join(RECORDS) + DELETED + "</PubmedArticleSet>\n").encode()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("piece_bytes", [1, 13, 1 << 20])
def test_pubmed_records(tmp_path, monkeypatch, pack, piece_bytes):
    monkeypatch.setattr(corpus.files, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(corpus.files, "CHUNK_BYTES", piece_bytes)
    path = tmp_path / "pubmed26n0001.xml.gz"
    path.write_bytes(pack(XML))
    documents, report = read("pubmed_xml", path, Selection())
    assert documents == EXPECTED
    assert report.dropped == {
        "no abstract": 2,
        "another language": 1,
        "no article": 1,
        "malformed XML": 1,
        "wrong type": 1,
    }
    assert report.deleted == [11, 12] and report.documents + report.dropped.total() == len(RECORDS)
    line = 1 + XML.decode().split("Broken")[0].rsplit("<PubmedArticle>", 1)[0].count("\n")
    assert report.samples["malformed XML"] == [f"{path}:{line}"]
    line = 1 + XML.decode().split("Nein")[0].rsplit("<PubmedArticle>", 1)[0].count("\n")
    assert report.samples["another language"] == [f"{path}:{line} (PMID 4)"]
    assert "german" not in str(documents) and len(read("pubmed_xml", path, EVERYTHING)[0]) == len(EXPECTED) + 1


def test_pubmed_files_cut_short_or_of_another_kind_are_named(tmp_path):
    path = tmp_path / "pubmed26n0001.xml"
    inside = XML.index(b"Five.")
    for data, message in [
        (XML[:inside], "the file is cut short, in the record of line"),
        (XML[: XML.index(b"<DeleteCitation")], "the file is cut short, at line"),
        (XML[:-19], "the file is cut short, at line"),
        (b"<html>Not found</html>", "is no PubMed XML: there is no <PubmedArticleSet> in it"),
        (b"", "is no PubMed XML"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read("pubmed_xml", path)
    path.with_suffix(".gz").write_bytes(gzip.compress(XML)[:-10])
    with pytest.raises(UserError, match="the archive is corrupt or truncated"):
        read("pubmed_xml", path.with_suffix(".gz"))


def test_pubmed_text_has_spaces_where_a_formula_stood(tmp_path):
    math = "<mml:math><mml:mi>x</mml:mi></mml:math>"
    text = f"Of<DispFormula>{math}</DispFormula>units, <mml:math><mml:mi>n</mml:mi></mml:math>-fold."
    (tmp_path / "a.xml").write_text(
        HEAD.replace("<PubmedArticleSet>", '<PubmedArticleSet xmlns:mml="http://www.w3.org/1998/Math/MathML">')
        + record(1, abstract_of(plain(text.replace("<mml:math>", '<mml:math xmlns:mml="m">'))))
        + "</PubmedArticleSet>"
    )
    assert read("pubmed_xml", tmp_path / "a.xml")[0][0].text == "A title.\nOf x units, n-fold."


@pytest.mark.parametrize("piece_bytes", [1, 13, 1 << 20])
@pytest.mark.parametrize(
    "broken",
    [
        record(50, abstract_of(plain("Cut"))).removesuffix("</PubmedArticle>\n"),
        record(50, abstract_of(plain("Cut")))[:80],
        "<!-- <PubmedArticle> -->",
        '<PubmedBookArticle><BookDocument><PMID Version="1">6</PMID></BookDocument>',
        '<PubmedArticle Status="x"/>',
        '<DeleteCitation><PMID Version="1">1</PMID>',
    ],
)
def test_a_pubmed_record_without_its_end_costs_no_other(tmp_path, monkeypatch, broken, piece_bytes):
    monkeypatch.setattr(corpus.files, "CHUNK_BYTES", piece_bytes)
    path = tmp_path / "a.xml"
    path.write_text(HEAD + RECORDS[0] + broken + "\n" + RECORDS[4] + RECORDS[6] + broken + "</PubmedArticleSet>")
    documents, report = read("pubmed_xml", path)
    assert documents == [EXPECTED[0], EXPECTED[2]] and not report.deleted
    wrong = "wrong type" if broken.endswith("/>") else "malformed XML"
    assert report.dropped == Counter({wrong: 2}) + Counter({"malformed XML": 1})
    lines = (HEAD + RECORDS[0] + broken + "\n" + RECORDS[4]).count("\n") + 1
    assert f"{path}:{lines}" in report.samples["malformed XML"]


def test_pubmed_ends_and_deletions_of_other_forms(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(HEAD.replace("<PubmedArticleSet>", "<PubmedArticleSet />"))
    assert read("pubmed_xml", path) == ([], ReadReport())
    deletion = '<DeleteCitation ><PMID Version="1">1</PMID><PMID>two</PMID></DeleteCitation\n>'
    text = HEAD + RECORDS[0].replace("</PubmedArticle>", "</PubmedArticle\n>") + deletion + "</PubmedArticleSet >"
    path.write_text(text)
    documents, report = read("pubmed_xml", path)
    assert documents == [EXPECTED[0]] and report.deleted == [1] and report.dropped == {"wrong type": 1}


def test_a_huge_pubmed_record_is_left_out_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.files, "MAX_RECORD_BYTES", 10_000)
    path = tmp_path / "a.xml"
    huge = record(10, abstract_of(plain("long " * 100_000)))
    path.write_text(HEAD + RECORDS[0] + huge + RECORDS[4] + "</PubmedArticleSet>")
    documents, report = read("pubmed_xml", path)
    assert documents == [EXPECTED[0], EXPECTED[2]] and report.dropped == {"too long": 1}


def test_pubmed_against_a_parser_of_the_whole_file(tmp_path):
    """Text of many records, as ElementTree has it of the whole document."""
    import xml.etree.ElementTree as ET

    records = [
        record(n, abstract_of(plain(f"Abstract &lt;{n}&gt; <i>in</i> vivo"), plain("\u03b2"))) for n in range(1, 500)
    ]
    data = (HEAD + "".join(records) + "</PubmedArticleSet>").encode()
    (tmp_path / "a.xml.gz").write_bytes(gzip.compress(data))
    documents, _ = read("pubmed_xml", tmp_path / "a.xml.gz")
    expected = []
    for article in ET.fromstring(data).iter("PubmedArticle"):
        parts = ["".join(part.itertext()) for part in article.iter("AbstractText")]
        text = "\n".join(["".join(article.find(".//ArticleTitle").itertext()), *parts])
        expected.append(Document(text, "PubMed Abstracts", int(article.findtext(".//PMID")), 1))
    assert documents == expected


# --- JATS --------------------------------------------------------------------------------------------------------

# As publishers deliver them, without white space between elements.
ARTICLE = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE article PUBLIC "-//NLM//DTD JATS (Z39.96) Archiving 1.3//EN" "JATS-archivearticle1-3.dtd">
<article xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML" xml:lang="en">\
<front><journal-meta><issn>1</issn></journal-meta><article-meta>\
<article-id pub-id-type="pmid">123</article-id><article-id pub-id-type="pmc">PMC9</article-id>\
<title-group><article-title>On <italic>Rod</italic> Cells:<break/>What They See</article-title></title-group>\
<permissions><license><license-p>CC BY</license-p></license></permissions>\
<abstract abstract-type="graphical"><p>A picture.</p></abstract>\
<abstract><sec><title>Background</title><p>Rods see.</p></sec><p>And cones.</p></abstract>\
<abstract abstract-type="plain-language-summary"><p>In short.</p></abstract>\
</article-meta></front>\
<body><p>Before all sections.</p>\
<sec><label>1</label><title>Introduction</title>\
<p>Rods<xref ref-type="bibr">[1]</xref> see at
 <inline-formula><mml:math><mml:mi>n</mml:mi><mml:mo>=</mml:mo><mml:mn>3</mml:mn></mml:math></inline-formula>.\
<disp-formula><tex-math>x^2</tex-math></disp-formula>So it is.</p>\
<fig><label>Figure 1</label><caption><p>A figure.</p></caption></fig>\
<sec><title>Deeper</title><p>Twice<table-wrap><table><tr><td>7</td></tr></table></table-wrap>over.</p>\
<list><list-item><label>1.</label><p>One</p><p>half</p></list-item><list-item><p>two</p></list-item></list>\
<def-list><def-item><term>ERG</term><def><p>A response.</p></def></def-item></def-list>\
<boxed-text><sec><title>Key points</title><p>Light.</p></sec></boxed-text></sec></sec></body>\
<back><ref-list><ref><mixed-citation>Somebody.</mixed-citation></ref></ref-list></back></article>"""
ARTICLE_TEXT = "\n\n".join(
    ["On Rod Cells: What They See", "Abstract", "Background", "Rods see.", "And cones.", "Before all sections."]
    + ["Introduction", "Rods[1] see at n=3. So it is.", "Deeper", "Twice over.", "1. One half two"]
    + ["ERG A response.", "Key points Light."]
)


def tar_of(members, mode="w"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def test_a_jats_article(tmp_path):
    path = tmp_path / "PMC9.nxml"
    path.write_text(ARTICLE)
    assert read("jats_xml", path, Selection())[0] == [Document(ARTICLE_TEXT, "PubMed Central", 123)]
    path.write_text(ARTICLE.replace('xml:lang="en"', 'xml:lang="de"'))
    assert read("jats_xml", path, Selection())[1].dropped == {"another language": 1}
    assert len(read("jats_xml", path, Selection(languages=("ger",)))[0]) == 1


def test_an_abstract_of_a_kind_of_its_own_serves_where_there_is_no_other(tmp_path):
    path = tmp_path / "PMC9.nxml"
    proper = ARTICLE[ARTICLE.index("<abstract>") : ARTICLE.index('<abstract abstract-type="plain')]
    path.write_text(ARTICLE.replace(proper, ""))
    assert "\n\nAbstract\n\nA picture.\n\nBefore all" in read("jats_xml", path)[0][0].text


def test_each_article_of_a_collection_is_a_document(tmp_path):
    article = ARTICLE[ARTICLE.index("<article ") :]
    reply = "<response><front-stub/><body><p>A reply.</p></body></response></article>"
    nested = article.replace("</article>", "<sub-article><body><p>A review.</p></body></sub-article>" + reply)
    german = article.replace('xml:lang="en"', 'xml:lang="de"')
    path = tmp_path / "set.xml"
    path.write_text(f"<pmc-articleset>{article}{nested}{german}<article/></pmc-articleset>")
    documents, report = read("jats_xml", path, Selection())
    assert [document.text for document in documents] == [ARTICLE_TEXT, ARTICLE_TEXT]
    assert report.dropped == {"another language": 1, "empty": 1}
    assert report.samples["another language"] == [f"{path}:1 (article 3)"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_jats_in_archives(tmp_path, pack, kind, monkeypatch):
    monkeypatch.setattr(tarfile, "DEFAULT_FORMAT", kind)
    folder = tarfile.TarInfo("PMC000")
    folder.type = tarfile.DIRTYPE
    link = tarfile.TarInfo("PMC000/link.xml")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        (folder, b""),
        ("PMC000/PMC1.xml", ARTICLE.encode()),
        ("../../../etc/passwd.xml", ARTICLE.replace("Rod", "Cone").encode()),
        ("PMC000/figure.jpg", b"\xff\xd8"),
        (link, b""),
        ("PMC000/PMC2.xml", ARTICLE.encode()[:-20]),
        ("PMC000/" + "long-" * 15 + ".nxml", ARTICLE.encode()),
        ("PMC000/PMC3.xml", b"<collection/>"),
    ]
    path = tmp_path / "oa.tar.gz"
    path.write_bytes(pack(tar_of(members)))
    before = sorted(tmp_path.rglob("*"))
    documents, report = read("jats_xml", path)
    assert [document.text for document in documents] == [
        ARTICLE_TEXT,
        ARTICLE_TEXT.replace("Rod", "Cone"),
        ARTICLE_TEXT,
    ]
    assert report.dropped == {"not XML": 2, "malformed XML": 1, "wrong type": 1}
    assert report.samples["malformed XML"] == [f"{path}:PMC000/PMC2.xml"]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked"


def test_broken_tar_archives_are_named(tmp_path):
    whole = tar_of([(f"PMC{number}.xml", ARTICLE.encode()) for number in range(3)])
    path = tmp_path / "oa.tar"
    at = len(whole) // 3
    for data in (whole[:at], whole[: 512 * 7], whole[:512], whole[:1000] + b"\xff" + whole[1001 : 512 * 6]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="oa.tar: the tar archive is broken or cut short"):
            read("jats_xml", path)


def test_a_header_of_a_tar_archive_cannot_take_memory(tmp_path):
    """A name that is a gigabyte long, as its header says, and is."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    path = tmp_path / "oa.tar"
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="oa.tar: the tar archive is broken"):
        read("jats_xml", path)


# --- XML that means harm -----------------------------------------------------------------------------------------

BOMB = '<!DOCTYPE article [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9)
)
HARMFUL = {
    "bomb": BOMB + "]><article><body><p>&j;</p></body></article>",
    "one entity, often": '<!DOCTYPE article [<!ENTITY a "'
    + "x" * 10_000
    + '">]><article>'
    + "&a;" * 1000
    + "</article>",
    "a file": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><article><body><p>&x;</p></body></article>',
    "parameters": '<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1:1/"> %x;]><article><body>a</body></article>',
    "unknown": "<article><body><p>&unknown;</p></body></article>",
}


@pytest.mark.parametrize("kind", HARMFUL)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_neither_expanded_nor_fetched(tmp_path, kind, encoding):
    path = tmp_path / "a.xml"
    path.write_bytes(HARMFUL[kind].encode(encoding))
    documents, report = read("jats_xml", path)
    assert not documents and report.dropped == {"malformed XML": 1}
    # What stands before the records of PubMed is never read.
    text = HARMFUL[kind].split("<article>")
    path.write_text(text[0] + "<PubmedArticleSet>" + RECORDS[0].replace("One.", "&j;&a;&x;") + "</PubmedArticleSet>")
    documents, report = read("pubmed_xml", path)
    assert not documents and report.dropped == {"malformed XML": 1}


def test_deep_nesting_is_no_recursion(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(
        f"<article><body><p>{'<b>' * 200_000}deep{'</b>' * 200_000}</p>{'<sec>' * 5000}{'</sec>' * 5000}</body>"
        "</article>"
    )
    assert read("jats_xml", path)[0][0].text == "deep"


# --- Names of formats and of places ------------------------------------------------------------------------------


def test_mixed_formats_are_told_apart(tmp_path):
    contents = {
        "a.jsonl": json.dumps({"text": "a"}).encode(),
        "b.parquet": None,
        "c.xml.gz": gzip.compress(XML),
        "d.nxml": ARTICLE.encode(),
        "e.tar.gz": gzip.compress(tar_of([("x.xml", ARTICLE.encode())])),
        "f.txt": b"plain",
        "g": zstandard.compress(b'{"text": "g"}\n{"text": "h"}'),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content or b"")
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "b.parquet")
    report = ReadReport()
    files = [str(tmp_path / name) for name in contents]
    found = [document.text for document in read_mixed(files, report, Selection(pile_sets=()))]
    assert found == ["a", "b", *(document.text for document in EXPECTED), ARTICLE_TEXT, ARTICLE_TEXT, "plain", "g", "h"]


@contextlib.contextmanager
def served(folder):
    """A web server of a folder, which lists it and serves parts of files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_text_behind_urls(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("deep/a.jsonl.gz", "deep/b.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(json.dumps({"text": name}).encode() + b"\n"))
    pq.write_table(pa.table({"text": ["far away"]}), tmp_path / "c.parquet")
    memory = fsspec.filesystem("memory")
    with served(tmp_path) as address:
        for name in ("deep/a.jsonl.gz", "deep/b.jsonl.gz", "c.parquet"):
            memory.pipe(f"/bucket/{name}", (tmp_path / name).read_bytes())
        for root in (f"file://{tmp_path}", "memory://bucket", address):
            files = corpus.expand_globs([f"{root}/deep/*.gz"])
            assert [file.rsplit("/", 1)[1] for file in files] == ["a.jsonl.gz", "b.jsonl.gz"]
            report = ReadReport()
            texts = [document.text for document in read_documents("pile", files, report, EVERYTHING)]
            assert texts == ["deep/a.jsonl.gz", "deep/b.jsonl.gz"]
            assert corpus.file_size(files[0]) == (tmp_path / "deep/a.jsonl.gz").stat().st_size
            assert corpus.file_identity(files[0]) != corpus.file_identity(files[1]) or root == address
            assert read("parquet", corpus.expand_globs([f"{root}/c.parquet"])[0])[0][0].text == "far away"
            with pytest.raises(UserError, match="nothing"):
                corpus.expand_globs([f"{root}/nothing.gz"])
    with pytest.raises(UserError, match=r"http://127.0.0.1:1/a.gz cannot be read \(.*\); check the address"):
        corpus.expand_globs(["http://127.0.0.1:1/a.gz"])


def test_unknown_protocols_and_missing_packages_are_named(monkeypatch):
    with pytest.raises(UserError, match=r"^ftpx://host/file: .*write a path, or gs://, s3:// or https://$"):
        corpus.expand_globs(["ftpx://host/file"])
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^gs://bucket/file: reading gs:// needs .*pip install 'biomedlm_jax\[gcs\]'$"):
        corpus.expand_globs(["gs://bucket/file"])


def test_strange_names_stay_in_one_line(tmp_path):
    path = tmp_path / "a\nb\x1b[31m.jsonl"
    path.write_text("{broken\n")
    _, report = read("pile", path)
    assert "\n" not in report.samples["not JSON"][0] and "\x1b" not in report.samples["not JSON"][0]
    with pytest.raises(UserError) as error:
        corpus.file_size(str(path) + "x")
    assert str(error.value).isprintable()


# --- TFDS --------------------------------------------------------------------------------------------------------


def test_the_tfds_builder(tmp_path):
    """Without TensorFlow, and known by name once the readers are imported."""
    (tmp_path / "pile/train").mkdir(parents=True)
    texts = {"train/00.jsonl": ["a", "b"], "train/01.jsonl": ["c"], "val.jsonl": ["d"], "test.jsonl": ["e"]}
    for name, lines in texts.items():
        meta = {"pile_set_name": "PubMed Central"}
        other = {"text": "x", "meta": {"pile_set_name": "Github"}}
        records = [other, *({"text": line, "meta": meta} for line in lines)]
        (tmp_path / "pile" / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    code = (
        "import sys, biomedlm_jax.corpus, tensorflow_datasets as tfds; "
        "builder = tfds.builder('pile_pubmed', data_dir=sys.argv[1], file_format='array_record'); "
        "builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=sys.argv[2])); "
        "print({name: [(row['text'].decode(), row['pile_set'].decode()) for row in builder.as_data_source(name)] "
        "for name in builder.info.splits}, [s.num_shards for s in builder.info.splits.values()], "
        "'tensorflow' in sys.modules, 'jax' in sys.modules)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "pile")]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    rows = {
        split: [(text, "PubMed Central") for text in found]
        for split, found in (("train", ["a", "b", "c"]), ("validation", ["d"]), ("test", ["e"]))
    }
    order = sorted(rows)
    assert said.endswith("False False")
    assert eval(said[: said.index("}") + 1]) == rows and order
    assert sum(map(int, said[said.index("}") + 3 : said.rindex("]")].split(", "))) == 4
