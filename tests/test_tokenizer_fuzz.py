"""Every string round-trips, and has the ids of the exported Hugging Face tokenizer and of `encode_array`."""

import re
from itertools import islice

import numpy as np
import pytest
from tokenizer_texts import corpus, fuzzed_texts

from biomedlm_jax import corpus as corpus_lib
from biomedlm_jax.tokenizer import Tokenizer, export_tokenizer, load_tokenizer, train_tokenizer

tokenizers = pytest.importorskip("tokenizers")

CHARACTERS = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]


def pile_texts(folder, pattern: str) -> list[str]:
    """All of the files' texts, also of sets that no biomedical model reads."""
    files = corpus_lib.expand_globs([f"{folder}/pile/{pattern}"])
    selection = corpus_lib.Selection(pile_sets=("PubMed Abstracts", "PubMed Central", "Github"))
    return [document.text for document in corpus_lib.read_mixed(files, corpus_lib.ReadReport(), selection)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(corpus(), 700, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def biomedical(tmp_path_factory) -> Tokenizer:
    """As a user would train it on the sample of The Pile."""
    from conftest import SHARED

    if not (SHARED / "data").is_dir():
        pytest.skip("the sample data are not beside this checkout")
    files = corpus_lib.expand_globs([f"{SHARED}/data/pile/train/*.zst"])
    texts = corpus_lib.tokenizer_texts(lambda: corpus_lib.read_mixed(files, corpus_lib.ReadReport()))
    return train_tokenizer(texts, 28_896, tmp_path_factory.mktemp("biomedical"))


def exported(tokenizer: Tokenizer, folder) -> "tokenizers.Tokenizer":
    """The file that a user has, read by the library alone; special tokens in text are text, as its config says."""
    export_tokenizer(tokenizer, folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return theirs


def check(tokenizer: Tokenizer, theirs, texts: list[str]) -> None:
    """In parts, which bounds the memory."""
    remaining = iter(texts)
    while part := list(islice(remaining, 20_000)):
        ids = tokenizer.encode_batch(part)
        for text, ours, encoding in zip(part, ids, theirs.encode_batch_fast(part), strict=True):
            assert tokenizer.decode(ours) == text
            assert ours == encoding.ids, repr(text)
            assert tokenizer.eos_id not in ours
        assert theirs.decode_batch(ids, skip_special_tokens=False) == part
        joined = np.array([token for ours in ids for token in [*ours, tokenizer.eos_id]])
        np.testing.assert_array_equal(tokenizer.encode_array(part), joined)


def test_random_strings(small, tmp_path):
    check(small, exported(small, tmp_path), fuzzed_texts(3000, seed=20))


def test_a_character_of_every_unicode_block(small, tmp_path):
    """Blocks begin at multiples of 16 and are no shorter."""
    some = CHARACTERS[7::16]
    check(small, exported(small, tmp_path), [*some, *(f"a {character}b" for character in some[::5]), "".join(some)])


@pytest.mark.parametrize("name", ["biomedical", "gpt2"])
class TestInFull:
    """Hundreds of thousands of strings, with the vocabularies that are used."""

    pytestmark = pytest.mark.slow

    @pytest.fixture
    def tokenizer(self, name, request, shared_data):
        return request.getfixturevalue("biomedical") if name == "biomedical" else load_tokenizer(shared_data / "gpt2")

    def test_random_strings(self, tokenizer, tmp_path):
        texts = fuzzed_texts(100_000, seed=21)
        assert len(set(texts)) > 80_000
        check(tokenizer, exported(tokenizer, tmp_path), texts)

    def test_every_character_alone_and_among_others(self, tokenizer, tmp_path):
        theirs = exported(tokenizer, tmp_path)
        check(tokenizer, theirs, CHARACTERS)
        text = "".join(CHARACTERS)
        check(tokenizer, theirs, [text[start : start + 100] for start in range(0, len(text), 100)])
        check(tokenizer, theirs, [" ".join(text[start : start + 256]) for start in range(0, len(text), 256)])

    def test_all_of_the_pile_sample(self, tokenizer, tmp_path, shared_data):
        texts = pile_texts(shared_data, "**/*.zst")
        assert len(texts) == 3706
        check(tokenizer, exported(tokenizer, tmp_path), texts)
        check(tokenizer, exported(tokenizer, tmp_path), re.split(r"(?<=\n)", "".join(texts)))


@pytest.mark.slow
def test_fewer_tokens_than_gpt2_on_held_out_text(biomedical, shared_data):
    gpt2 = load_tokenizer(shared_data / "gpt2")
    by_source: dict[str, list[str]] = {}
    files = corpus_lib.expand_globs([f"{shared_data}/pile/test.jsonl.zst"])
    for document in corpus_lib.read_mixed(files, corpus_lib.ReadReport()):
        by_source.setdefault(document.source, []).append(document.text)
    assert by_source.keys() == {"PubMed Abstracts", "PubMed Central"}
    counts = {
        source: [sum(map(len, tokenizer.encode_batch(texts))) for tokenizer in (biomedical, gpt2)]
        for source, texts in by_source.items()
    }
    assert all(ours < theirs for ours, theirs in counts.values()), counts
    ours, theirs = counts["PubMed Abstracts"]
    assert ours < 0.9 * theirs
