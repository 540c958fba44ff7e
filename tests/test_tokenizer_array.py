"""`encode_array` is fast and gives the ids of `encode`, whatever its cache holds."""

import pickle
import random
import threading
import time

import numpy as np
import pytest
import sentencepiece
from tokenizer_texts import corpus, fuzzed_texts

from biomedlm_jax.tokenizer import EOS, ByteLevelTokenizer, SentencePieceTokenizer, Tokenizer, base, train_tokenizer
from biomedlm_jax.tokenizer.training import _complete

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    return train_tokenizer(corpus(), 700, tmp_path_factory.mktemp("model")).files["tokenizer.model"]


@pytest.fixture(scope="module")
def byte_level_files(tmp_path_factory) -> tuple[bytes, bytes]:
    """Some of its words hold runs of spaces and of line ends, as GPT-2's do."""
    trained = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    texts = [text + " \n\n  \t  x" for text in corpus()]
    trained.train_from_iterator(texts, vocab_size=699, min_frequency=2, show_progress=False)
    folder = tmp_path_factory.mktemp("byte_level")
    trained.save_model(str(folder))
    return (folder / "vocab.json").read_bytes(), (folder / "merges.txt").read_bytes()


@pytest.fixture(params=["sentencepiece", "byte_level"])
def tokenizer(request, model, byte_level_files) -> Tokenizer:
    if request.param == "sentencepiece":
        return SentencePieceTokenizer(model)
    return ByteLevelTokenizer(*byte_level_files, {})


def one_by_one(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    return np.array([token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]])


TEXTS = [*fuzzed_texts(3000, seed=11), *corpus()[:50], "a\ud83d b\udc80", "\ud800", "\u2581 \u2581a \u2581"]
SPACES = [
    *["".join(random.Random(seed).choices("a! \n\t\x1c\x85\u3000\u2581'", k=12)) for seed in range(3000)],
    *["", " ", "  ", "a ", " a", "a  b", "a \nb", "a\n b", "a\n  b", "a \n  b \n", "\n\n \n", "it 's", "a  's"],
    *["!\x1c !", "a\x85  b", "a\u3000 b", "a \u3000b", "a \u3000 b"],
]


@pytest.mark.parametrize("texts", [TEXTS, SPACES], ids=["fuzzed", "spaces"])
def test_ids_are_those_of_encode(tokenizer, texts):
    expected = one_by_one(tokenizer, texts)
    for _ in range(2):  # all words are new, and all are known
        ids = tokenizer.encode_array(texts)
        assert ids.dtype == np.uint16 and ids.flags.writeable
        np.testing.assert_array_equal(ids, expected)
    parts = [tokenizer.encode_array(texts[start : start + 7], threads=2) for start in range(0, len(texts), 7)]
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_no_text_and_empty_texts(tokenizer):
    assert tokenizer.encode_array([]).shape == (0,) and tokenizer.encode_array([]).dtype == np.uint16
    assert tokenizer.encode_array(["", ""]).tolist() == [tokenizer.eos_id] * 2
    assert (tokenizer.encode_array([EOS]) == tokenizer.eos_id).sum() == 1, "the text's own is plain text"


def test_ids_do_not_depend_on_what_the_cache_keeps(tokenizer, monkeypatch):
    expected = one_by_one(tokenizer, TEXTS)
    monkeypatch.setattr(base, "_CACHED_WORDS", 50)
    monkeypatch.setattr(base, "_CACHED_LENGTH", 5)
    parts = []
    for start in range(0, len(TEXTS), 10):
        parts.append(tokenizer.encode_array(TEXTS[start : start + 10]))
        assert len(tokenizer._cache) <= 50
        assert all(len(word) <= 5 for word in tokenizer._cache)
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_frequent_words_stay_in_a_full_cache(tokenizer, monkeypatch):
    monkeypatch.setattr(base, "_CACHED_WORDS", 40)
    for number in range(100):
        tokenizer.encode_array([f"the patients {number}a {number}b"])
    assert {"the", " patients"} <= tokenizer._cache.keys()


def test_threads_may_share_a_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(base, "_CACHED_WORDS", 50)
    slices = [TEXTS[start::4] for start in range(4)]
    expected = [one_by_one(tokenizer, texts) for texts in slices]
    found = [[] for _ in slices]

    def encode(index: int) -> None:
        found[index] += [tokenizer.encode_array([text]) for text in slices[index]]

    threads = [threading.Thread(target=encode, args=[index]) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(ours), theirs)


def test_a_pickle_leaves_the_cache_behind(tokenizer):
    size = len(pickle.dumps(tokenizer))
    expected = tokenizer.encode_array(TEXTS)
    assert len(pickle.dumps(tokenizer)) == size
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer)).encode_array(TEXTS), expected)


def test_large_vocabularies_take_four_bytes(byte_level_files):
    small = ByteLevelTokenizer(*byte_level_files, {})
    added = {f"<{number}>": number for number in range(small.eos_id, 70_000)}
    large = ByteLevelTokenizer(*byte_level_files, added)
    assert large.eos_id == 70_000
    ids = large.encode_array(["a b", "c"])
    assert ids.dtype == np.uint32 and ids.tolist() == one_by_one(large, ["a b", "c"]).tolist()
    exact = ByteLevelTokenizer(*byte_level_files, {f"<{id_}>": id_ for id_ in range(small.eos_id, 65_535)})
    assert exact.vocab_size == 65_536
    assert exact.encode_array(["a"]).dtype == np.uint16 and exact.encode_array([""]).tolist() == [65_535]


OTHER_MODELS = {
    "phrases": {"split_by_whitespace": False, "max_sentencepiece_length": 64},
    "spaces at ends": {"treat_whitespace_as_suffix": True},
    "a space before": {"add_dummy_prefix": True},
    "trimmed": {"remove_extra_whitespaces": True},
    "composed": {"normalization_rule_name": "nfkc"},
    "unigram": {"model_type": "unigram"},
    "a phrase by name": {"user_defined_symbols": ["immuno  histo"]},
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_sentencepiece_models_of_other_rules(name, tmp_path):
    """Not from `train_tokenizer`, but with its end of text: slow, or as fast where that is exact."""
    prefix = str(tmp_path / "other")
    settings = {
        "model_type": "bpe",
        "vocab_size": 600,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "bos_id": -1,
        "eos_id": -1,
        "minloglevel": 2,
    } | OTHER_MODELS[name]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_prefix=prefix, **settings)
    model = _complete((tmp_path / "other.model").read_bytes(), 700)
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(model)
    texts = [
        *["immuno  histo chemistry", "of the (n = 12)", "", " ", "  of", "the "],
        *[text for text in fuzzed_texts(2000, seed=12) if "\u2581" not in text],
        *corpus()[:50],
    ]
    if name == "phrases":
        assert any("\u2581" in tokenizer.piece(token)[1:] for token in range(257, tokenizer.eos_id))
    assert [tokenizer.encode(text) for text in texts] == plain.encode(texts)
    np.testing.assert_array_equal(tokenizer.encode_array(texts), one_by_one(tokenizer, texts))


@pytest.mark.slow
def test_a_core_encodes_at_a_corpus_rate(shared_data, tmp_path):
    """In SentencePiece's rate on the same text in the same minute, since processors differ and are shared."""
    import biomedlm_jax.corpus as corpus_lib

    files = corpus_lib.expand_globs([f"{shared_data}/pile/train/*.zst"])
    texts = [document.text for document in corpus_lib.read_mixed(files, corpus_lib.ReadReport())]
    abstracts = corpus_lib.tokenizer_texts(lambda: corpus_lib.read_mixed(files, corpus_lib.ReadReport()))
    trained = train_tokenizer(abstracts, 28_896, tmp_path)

    def seconds(encode) -> float:
        start = time.process_time()
        for first in range(0, len(texts), 256):
            encode(texts[first : first + 256])
        return time.process_time() - start

    plain = sentencepiece.SentencePieceProcessor(model_proto=trained.files["tokenizer.model"])
    theirs = min(seconds(lambda batch: plain.encode(batch, num_threads=1)) for _ in range(2))
    cold = min(seconds(pickle.loads(pickle.dumps(trained)).encode_array) for _ in range(2))
    seconds(trained.encode_array)
    warm = min(seconds(trained.encode_array) for _ in range(2))
    assert cold < theirs / 1.5 and warm < theirs / 2.5, (cold, warm, theirs)
