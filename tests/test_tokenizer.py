"""The two kinds of tokenizer: lossless, deterministic, and the same ids as Hugging Face's from what is exported."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import TRICKY, corpus, fuzzed_texts, without_surrogates

from biomedlm_jax import encoding
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import FinetuneConfig
from biomedlm_jax.tokenizer import EOS, ByteLevelTokenizer, export_tokenizer, load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

ANY_CHARACTER = st.characters(exclude_categories=())
TEXTS = st.lists(st.one_of(st.sampled_from(TRICKY), st.text(ANY_CHARACTER, max_size=8)), max_size=12).map("".join)


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_tokenizer(corpus(), 700, folder)
    return folder


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory):
    """In the form of the published BioMedLM, whose vocab.json lacks <|endoftext|>."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    trained.train_from_iterator(corpus(), vocab_size=699, min_frequency=2, show_progress=False)
    folder = tmp_path_factory.mktemp("byte_level")
    trained.save_model(str(folder))
    assert EOS not in json.loads((folder / "vocab.json").read_text())
    return folder


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory):
    if not (SHARED / "gpt2").exists():
        pytest.skip(f"needs GPT-2's vocabulary in {SHARED / 'gpt2'}")
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(SHARED / "gpt2" / "encoder.json", folder / "vocab.json")
    shutil.copy(SHARED / "gpt2" / "vocab.bpe", folder / "merges.txt")
    return folder


@pytest.fixture(params=["sentencepiece_dir", "byte_level_dir", "gpt2_dir"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


def pile_documents(file: str, count: int) -> list[str]:
    if not (SHARED / "pile").exists():
        pytest.skip(f"needs real documents in {SHARED / 'pile'}")
    import zstandard

    with zstandard.open(SHARED / "pile" / file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]


# --- Lossless ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentencepiece_dir", "byte_level_dir"])
def test_round_trip_of_any_string(kind, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))

    @settings(max_examples=400, deadline=None, database=None)
    @given(TEXTS)
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == without_surrogates(text)
        assert tokenizer.eos_id not in ids
        assert all(0 <= token < tokenizer.vocab_size for token in ids)

    check()


def test_round_trip_of_every_character(tokenizer):
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    text = "".join(map(chr, points[:: 1 if isinstance(tokenizer, ByteLevelTokenizer) else 3]))
    blocks = [text[start : start + 5000] for start in range(0, len(text), 5000)]
    assert list(map(tokenizer.decode, tokenizer.encode_batch(blocks))) == blocks


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d b\udc80\ud800")) == "a\ufffd b\ufffd\ufffd"


def test_batch_equals_single(tokenizer):
    texts = ["", *fuzzed_texts(2000, seed=1), "\u2581", "\u2581\u2581", ""]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_end_of_text_is_plain_text_and_special_ids_have_no_text(tokenizer):
    ids = tokenizer.encode(f"a{EOS}b")
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == f"a{EOS}b"
    assert tokenizer.decode([*tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode("two")]) == "onetwo"


def test_a_pickled_copy_encodes_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    texts = fuzzed_texts(200, seed=2)
    assert copy.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert copy.fingerprint == tokenizer.fingerprint and copy.vocab_size == tokenizer.vocab_size


def test_long_texts_in_parts_have_the_ids_of_the_whole(sentencepiece_dir):
    import sentencepiece

    whole = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_dir / "tokenizer.model"))
    tokenizer = load_tokenizer(sentencepiece_dir)
    # The premise of splitting before a space.
    assert not any("\u2581" in tokenizer.piece(token)[1:] for token in range(tokenizer.vocab_size))
    for text in (
        "\n".join(corpus())[:70_000],
        " " * 5000,
        "a" * 5000,
        " ".join(corpus()[:20]) * 3,
        "immuno " * 2000,
        "\n \n" * 3000,
        "x" * 1999 + "  y" + "z" * 2000 + " " + "immuno" * 700,
    ):
        assert tokenizer.encode(text) == whole.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_very_long_text(tokenizer):
    text = ("\n".join(corpus()) + "\0\u2581") * 10
    assert tokenizer.decode(tokenizer.encode(text)) == text


# --- Training ------------------------------------------------------------------------------------------------------


def test_training_is_deterministic_and_fills_the_vocabulary(tmp_path, sentencepiece_dir):
    first = load_tokenizer(sentencepiece_dir)
    again = train_tokenizer(iter(corpus()), 700, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (sentencepiece_dir / "tokenizer.model").read_bytes()
    assert again.fingerprint == first.fingerprint
    assert os.listdir(tmp_path / "again") == ["tokenizer.model"]
    assert (first.vocab_size, first.eos_id, first.piece(699)) == (700, 699, EOS)
    assert train_tokenizer(corpus()[1:], 700, tmp_path / "other").fingerprint != first.fingerprint
    wide = train_tokenizer(corpus(), 28_896, tmp_path / "wide")
    assert (wide.vocab_size, wide.eos_id) == (28_896, 28_895)
    assert wide.piece(28_894).startswith("<unused ")


def test_long_words_are_learnt_whole(tmp_path):
    tokenizer = train_tokenizer(["Immunohistochemistry of immunohistochemistry\n" * 50], 500, tmp_path)
    assert [len(tokenizer.encode(word)) for word in ("Immunohistochemistry", " immunohistochemistry")] == [1, 1]


def test_training_text_is_neither_dropped_nor_taken_for_special_tokens(tmp_path):
    line = f"abcdef{EOS}ghi\0jkl\u2585mno\u2581pqr\ud800 <unk> <0x41>"
    tokenizer = train_tokenizer([line] * 1000 + ["stuvwx " * 160_000], 400, tmp_path)
    for word in ("abcdef", "ghi", "jkl", "mno", "pqr", " stuvwx"):
        assert len(tokenizer.encode(word)) == 1, word
    assert tokenizer.decode(tokenizer.encode(line)) == line.replace("\ud800", "\ufffd")
    assert tokenizer.eos_id not in tokenizer.encode(line)


def test_a_corpus_full_of_end_of_text_does_not_learn_it(tmp_path):
    """SentencePiece's pieces do not mix letters and signs: none can take the name of the special token."""
    tokenizer = train_tokenizer([f"{EOS} abc", EOS] * 1000, 400, tmp_path)
    assert len(tokenizer.encode(EOS)) > 1 and len(tokenizer.encode(" abc")) == 1


def test_text_without_spaces_is_learnt_from(tmp_path):
    """SentencePiece by default drops what is over 4,192 bytes."""
    assert len(train_tokenizer(["stuvwx" + "é" * 3000] * 50, 300, tmp_path).encode("stuvwx")) == 1


def test_training_stops_reading_after_max_bytes(tmp_path):
    read = []
    texts = (read.append(index) or "abc é " * 100 for index in range(1000))
    train_tokenizer(texts, 300, tmp_path, max_bytes=7000)
    assert len(read) == 10  # of 700 bytes each


def test_an_error_of_the_corpus_stays_itself_and_nothing_is_written(tmp_path):
    def texts():
        yield "abc"
        raise EOFError("00.jsonl.zst is truncated")

    with pytest.raises(EOFError, match="^00.jsonl.zst is truncated$"):
        train_tokenizer(texts(), 300, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "corpus to train a tokenizer on is empty"),
        (["", ""], 300, "corpus to train a tokenizer on is empty"),
        (["abc"], 258, "vocabulary of 258 is too small: 256 bytes"),
        (["abcdefgh"], 264, "vocabulary of 264 is too small for the characters of this corpus: it takes 266 or more"),
        (["\n\n"], 300, "cannot be trained on this corpus"),
    ],
)
def test_training_errors(texts, vocab_size, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, vocab_size, tmp_path)


def test_the_least_vocabulary_is_the_one_that_the_error_names(tmp_path):
    tokenizer = train_tokenizer(["abcdefgh"], 266, tmp_path)
    assert [tokenizer.piece(id_) for id_ in tokenizer.encode("had")] == ["h", "a", "d"]


# --- Hugging Face --------------------------------------------------------------------------------------------------


@pytest.fixture
def auto_tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer


def assert_same(tokenizer, hf, texts):
    ids = tokenizer.encode_batch(texts)
    different = [text for text, ours, theirs in zip(texts, ids, hf(texts)["input_ids"], strict=True) if ours != theirs]
    assert not different, different[:3]
    assert hf.batch_decode(ids) == list(map(tokenizer.decode, ids)) == texts


@pytest.mark.parametrize("model_config", [None, {"model_type": "gpt2"}])
def test_export_gives_the_same_ids(folder, model_config, tmp_path, auto_tokenizer):
    """Also beside the config.json of a model, by which AutoTokenizer may choose another class."""
    tokenizer = load_tokenizer(folder)
    export_tokenizer(tokenizer, tmp_path, model_max_length=512)
    if model_config:
        (tmp_path / "config.json").write_text(json.dumps(model_config))
    hf = auto_tokenizer.from_pretrained(str(tmp_path))
    texts = fuzzed_texts(4000, seed=3)
    assert_same(tokenizer, hf, texts)
    assert hf.bos_token_id == hf.eos_token_id == hf.pad_token_id == tokenizer.eos_id
    assert (hf.eos_token, len(hf), hf.model_max_length) == (EOS, tokenizer.vocab_size, 512)
    every_id = [[token] for token in range(tokenizer.vocab_size)]
    assert hf.batch_decode(every_id, skip_special_tokens=True) == list(map(tokenizer.decode, every_id))
    assert set(hf("text")) == {"input_ids", "attention_mask"}
    # The default of transformers 4 has token_type_ids too, which GPT-2 adds to its embeddings.
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert hf(["a", "a b c d"], padding=True)["input_ids"][0][-1] == tokenizer.eos_id
    hf.save_pretrained(str(tmp_path / "saved"))
    assert_same(tokenizer, auto_tokenizer.from_pretrained(str(tmp_path / "saved")), texts[:1000])


def test_export_gives_the_same_ids_on_real_documents(tmp_path, auto_tokenizer):
    tokenizer = train_tokenizer(pile_documents("train/00.jsonl.zst", 600), 4096, tmp_path)
    export_tokenizer(tokenizer, tmp_path)
    assert_same(tokenizer, auto_tokenizer.from_pretrained(str(tmp_path)), pile_documents("val.jsonl.zst", 300))


def test_an_exported_or_saved_folder_holds_the_same_tokenizer(tokenizer, tmp_path):
    texts = fuzzed_texts(100, seed=4)
    export_tokenizer(tokenizer, tmp_path / "exported")
    tokenizer.save(tmp_path / "saved")
    for name in ("exported", "saved"):
        loaded = load_tokenizer(tmp_path / name)
        assert (loaded.fingerprint, loaded.eos_id) == (tokenizer.fingerprint, tokenizer.eos_id)
        assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)


def test_the_words_of_a_task_keep_their_ids_in_an_export(tokenizer, tmp_path):
    config = FinetuneConfig()
    ids = encoding.added_ids(config, tokenizer)
    assert list(ids) == ["[PAD]", "[CLS]", "[SEP]"]
    assert list(ids.values()) == [tokenizer.vocab_size + number for number in range(3)]
    export_tokenizer(tokenizer, tmp_path, added_tokens=config.added_tokens)
    loaded = load_tokenizer(tmp_path)
    assert encoding.added_ids(config, loaded) == ids
    assert loaded.encode("a[SEP]") == tokenizer.encode("a[SEP]")


def test_export_needs_neither_torch_nor_transformers(sentencepiece_dir, tmp_path):
    code = (
        f"import sys; from biomedlm_jax.tokenizer import *; "
        f"export_tokenizer(load_tokenizer({str(sentencepiece_dir)!r}), {str(tmp_path)!r}); "
        f"assert not {{'torch', 'transformers', 'jax'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("kind", ["byte_level_dir", "gpt2_dir"])
def test_byte_level_gives_the_ids_of_gpt2_tokenizer(kind, request):
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(kind)
    tokenizer = load_tokenizer(folder)
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(folder), split_special_tokens=True)
    assert_same(tokenizer, theirs, fuzzed_texts(3000, seed=5))
    assert tokenizer.vocab_size == len(theirs) and tokenizer.eos_id == theirs.eos_token_id
    if kind == "byte_level_dir":
        assert tokenizer.eos_id == len(json.loads((folder / "vocab.json").read_text()))


def test_known_ids_of_gpt2(gpt2_dir):
    tokenizer = load_tokenizer(gpt2_dir)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]


def test_files_by_openais_names(byte_level_dir, tmp_path):
    shutil.copy(byte_level_dir / "vocab.json", tmp_path / "encoder.json")
    shutil.copy(byte_level_dir / "merges.txt", tmp_path / "vocab.bpe")
    tokenizer, same = load_tokenizer(tmp_path), load_tokenizer(byte_level_dir)
    assert (tokenizer.fingerprint, tokenizer.eos_id) == (same.fingerprint, same.eos_id)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == same.fingerprint
    (tmp_path / "vocab.bpe").unlink()
    with pytest.raises(UserError, match="holds no tokenizer: .*found encoder.json, saved"):
        load_tokenizer(tmp_path)


def test_added_tokens_keep_their_ids(byte_level_dir, tmp_path):
    shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
    size = len(json.loads((tmp_path / "vocab.json").read_text()))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": size + 1, EOS: size}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(size + 2): {"content": "[SEP]"}}})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.piece(size + 2)) == (size + 3, size, "[SEP]")
    assert tokenizer.decode([size + 1, *tokenizer.encode("a[SEP]b"), size + 2]) == "a[SEP]b"
    export_tokenizer(tokenizer, tmp_path / "exported")
    assert load_tokenizer(tmp_path / "exported").fingerprint == tokenizer.fingerprint


# --- Wrong folders -------------------------------------------------------------------------------------------------


def test_wrong_folders(tmp_path, sentencepiece_dir):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="tokenizer.model is a file"):
        load_tokenizer(sentencepiece_dir / "tokenizer.model")
    with pytest.raises(
        UserError, match="expected tokenizer.model, or vocab.json .*, or encoder.json .*; found nothing"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="found vocab.json"):
        load_tokenizer(tmp_path)


def test_broken_sentencepiece_models(tmp_path):
    import io

    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="tokenizer.model is no SentencePiece model"):
        load_tokenizer(tmp_path)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"]), model_writer=model, vocab_size=10, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="was not trained by this package"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("vocab.json", lambda text: text[:-5], "vocab.json is not JSON"),
        ("vocab.json", lambda text: "[1]", "vocab.json is not a JSON object"),
        ("vocab.json", lambda text: '{"a": "b"}', "vocab.json does not map tokens to numbers"),
        ("vocab.json", lambda text: '{"a": 0}', "vocab.json lacks 255 of the 256"),
        ("vocab.json", lambda text: text.replace('":5,', '":500000,'), r"do not number their \d+ tokens from 0 on"),
        ("merges.txt", lambda text: text + "qq zz\n", "merges.txt does not fit vocab.json"),
        ("merges.txt", lambda text: text + "onlyone\n", "merges.txt does not fit vocab.json"),
        ("added_tokens.json", lambda text: '{"[PAD]": 3000}', r"do not number their \d+ tokens from 0 on"),
    ],
)
def test_broken_byte_level_files(name, edit, message, byte_level_dir, tmp_path):
    shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    path.write_text(edit(path.read_text() if path.exists() else ""))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


# --- The command ---------------------------------------------------------------------------------------------------


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "biomedlm_jax.tokenizer", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_command(tmp_path):
    records = [{"text": f"immunology {text}", "meta": {"pile_set_name": "PubMed Abstracts"}} for text in corpus()]
    records.append({"text": "zzqqzzqq " * 5000, "meta": {"pile_set_name": "PubMed Central"}})
    (tmp_path / "00.jsonl").write_text("\n".join(map(json.dumps, records)))
    made, exported = tmp_path / "made", tmp_path / "exported"

    trained = command("train", "--input", tmp_path / "*.jsonl", "--output", made, "--vocab-size", 700)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    tokenizer = load_tokenizer(made)
    assert tokenizer.vocab_size == 700
    assert len(tokenizer.encode(" zzqqzzqq")) > 1, "full text is not trained on where there are abstracts"

    assert command("export", made, "--output", exported).returncode == 0
    assert load_tokenizer(exported).fingerprint == tokenizer.fingerprint
    assert command("export", made, "--output", exported).returncode == 0, "the same tokenizer may be written again"

    again = command("train", "--input", tmp_path / "*.jsonl", "--output", made)
    assert again.returncode == 2 and again.stderr.startswith(f"error: {made} already holds a tokenizer")
    train_tokenizer(corpus(), 500, tmp_path / "other")
    other = command("export", tmp_path / "other", "--output", exported)
    assert other.returncode == 2 and f"{exported} already holds another tokenizer" in other.stderr


def test_command_without_abstracts_trains_on_all_text(tmp_path):
    record = {"text": "zzqqzzqq " * 50, "meta": {"pile_set_name": "PubMed Central"}}
    (tmp_path / "00.jsonl").write_text(json.dumps(record))
    (tmp_path / "notes.txt").write_text("wwvvwwvv " * 50)
    result = command(
        "train",
        "--input",
        tmp_path / "*.jsonl",
        tmp_path / "notes.txt",
        "--output",
        tmp_path / "made",
        "--vocab-size",
        300,
    )
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer(tmp_path / "made")
    assert [len(tokenizer.encode(word)) for word in (" zzqqzzqq", " wwvvwwvv")] == [1, 1]


def test_command_says_why_there_is_no_text(tmp_path):
    (tmp_path / "00.jsonl").write_text(json.dumps({"text": "a", "meta": {"pile_set_name": "Github"}}))
    result = command("train", "--input", tmp_path / "00.jsonl", "--output", tmp_path / "made")
    assert result.returncode == 2
    assert "no text in" in result.stderr and "another set" in result.stderr
    assert not (tmp_path / "made").exists()


def test_help_needs_no_heavy_import():
    code = (
        "import sys; import biomedlm_jax.tokenizer; "
        "assert not {'numpy', 'sentencepiece', 'tokenizers', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "28896" in command("train", "--help").stdout
