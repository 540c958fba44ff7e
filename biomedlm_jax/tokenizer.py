"""Text to token ids and back, losslessly: SentencePiece trained here, and the published model's byte-level BPE.

python -m biomedlm_jax.tokenizer train --input GLOB... --output DIR | inspect DIR WORD... | export DIR --output DIR
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from biomedlm_jax.errors import UserError, run_command
from biomedlm_jax.files import replace_file

if TYPE_CHECKING:
    import tokenizers

EOS = "<|endoftext|>"
PUBLISHED_VOCAB_SIZE = 28_896  # https://huggingface.co/stanford-crfm/BioMedLM
# Text to train on: a minute, and 1.4 GB of memory.
TRAINING_BYTES = 400_000_000
# Ids before the learnt pieces of a tokenizer trained here: <unk> and the bytes.
_FIRST_LEARNT = 1 + 256
# SentencePiece writes a space as U+2581, and so reads this character in a text as a space.
_SPACE = "\u2581"
# Parts of a text that SentencePiece may encode one by one: no piece holds a space after its first character, so that
# none reaches over a part's end, and short parts are four times as fast as a whole book.
_PARTS = re.compile(f"{_SPACE}|[^{_SPACE}]{{1,2000}}[^{_SPACE} ]*")
# JSON escapes can spell half of a surrogate pair, which no UTF-8 and no tokenizer can hold.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Training drops a sentence that holds NUL or U+2585.
_SENTENCE_ENDS = re.compile(f"[\n\0\u2585{_SPACE}]")


class Tokenizer(ABC):
    """What both kinds share. Picklable; equal fingerprints mean equal ids.

    Attributes:
      files: the files that `load_tokenizer` reads, by name.
      vocab_size: number of ids.
      eos_id: id of `<|endoftext|>`, which no text encodes to.
      fingerprint: SHA-256 of the files, in hexadecimal.
    """

    vocab_size: int
    eos_id: int

    def __init__(self, files: Mapping[str, bytes]):
        self.files = dict(files)
        digests = [f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items())]
        self.fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in threads."""

    def encode_array(self, texts):
        import numpy as np

        return np.concatenate([np.asarray([*ids, self.eos_id], np.uint16) for ids in self.encode_batch(texts)])

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens have none. Bytes that are no UTF-8 become U+FFFD.

        Only there, in what a model makes up, can Hugging Face's text differ: SentencePiece loses fewer bytes.
        """

    @abstractmethod
    def piece(self, token: int) -> str:
        """How the vocabulary writes a token."""

    @abstractmethod
    def hugging_face(self) -> tokenizers.Tokenizer:
        """The same tokenizer in the form of a Hugging Face `tokenizer.json`."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which `decode` turns back into it.

        Nothing is added, `<|endoftext|>` in the text is plain text, and lone surrogates become U+FFFD.
        """
        return self.encode_batch([text])[0]

    def save(self, directory: str | Path) -> None:
        """Writes the files that `load_tokenizer` reads."""
        _write(directory, self.files)


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece BPE with byte fallback, as `train_tokenizer` makes it: <unk>, bytes, pieces, `<|endoftext|>`."""

    def __init__(self, model: bytes):
        """Raises: UserError: `model` is not of `train_tokenizer`."""
        import sentencepiece

        super().__init__({"tokenizer.model": model})
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"tokenizer.model is no SentencePiece model: {error}") from error
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self.vocab_size - 1
        if self.piece(self.eos_id) != EOS or not self._processor.is_control(self.eos_id):
            raise UserError(
                f"tokenizer.model was not trained by this package: its last piece is "
                f"{self.piece(self.eos_id)}, not {EOS}"
            )
        self._space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; the threads share the parts of all texts."""
        split = [_PARTS.findall(_valid(text)) for text in texts]
        encoded = iter(self._processor.encode(list(chain.from_iterable(split))))
        # zip asks for a part first, so that it takes no text's ids too many.
        return [
            list(
                chain.from_iterable(
                    self._space_bytes if part == _SPACE else ids for part, ids in zip(parts, encoded, strict=False)
                )
            )
            for parts in split
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._processor.decode([int(token) for token in ids])

    def piece(self, token: int) -> str:
        """SentencePiece's way to write a token: U+2581 is a space, <0x0A> a byte."""
        return self._processor.id_to_piece(int(token))

    def hugging_face(self) -> tokenizers.Tokenizer:
        """SentencePiece's ids from the `tokenizers` library.

        Merges are all splits of each piece into two, in the order in which SentencePiece merges. Pieces hold true
        spaces, unlike SentencePiece's, so that U+2581 is a character like any other.
        """
        import tokenizers

        pieces = [self.piece(token).replace(_SPACE, " ") for token in range(self.vocab_size)]
        learnt = {
            pieces[token]: token for token in range(_FIRST_LEARNT, self.eos_id) if not self._processor.is_unused(token)
        }
        merges = sorted(
            (-self._processor.get_score(token), learnt[piece[:cut]], learnt[piece[cut:]], piece[:cut], piece[cut:])
            for piece, token in learnt.items()
            for cut in range(1, len(piece))
            if piece[:cut] in learnt and piece[cut:] in learnt
        )
        backend = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                {piece: token for token, piece in enumerate(pieces)},
                [merge[-2:] for merge in merges],
                unk_token=pieces[0],
                byte_fallback=True,
                fuse_unk=False,
            )
        )
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_next")
        backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
        backend.add_special_tokens([EOS])
        return backend


class ByteLevelTokenizer(Tokenizer):
    """GPT-2's byte-level BPE, which the published BioMedLM uses."""

    def __init__(self, vocab: bytes, merges: bytes, added: Mapping[str, int]):
        """Args:
          vocab: contents of vocab.json.
          merges: contents of merges.txt.
          added: ids of tokens that no text encodes to, such as `<|endoftext|>`, which gets the next id if it has none.

        Raises:
          UserError: the three contradict each other, or cannot encode every text.
        """
        import tokenizers

        words = _token_ids(vocab, "vocab.json")
        special = {EOS: words.get(EOS, len({**words, **added})), **added}
        self._special = {name: special[name] for name in sorted(special, key=special.__getitem__)}
        super().__init__({"vocab.json": vocab, "merges.txt": merges, "added_tokens.json": _json_bytes(self._special)})
        ids = {**words, **self._special}
        self.vocab_size, self.eos_id = len(ids), self._special[EOS]
        if sorted(ids.values()) != list(range(self.vocab_size)):
            raise UserError(f"vocab.json and the added tokens do not number their {self.vocab_size} tokens from 0 on")
        missing = [symbol for symbol in tokenizers.pre_tokenizers.ByteLevel.alphabet() if symbol not in words]
        if missing:
            raise UserError(f"vocab.json lacks {len(missing)} of the 256 symbols of bytes: not GPT-2's kind")
        lines = merges.decode("utf-8", "replace").splitlines()
        # Only the first line can be a comment: "# #" is a merge.
        pairs = [
            tuple(line.split(" "))
            for index, line in enumerate(lines)
            if line and not (index == 0 and line.startswith("#version"))
        ]
        try:
            self._backend = tokenizers.Tokenizer(tokenizers.models.BPE(words, pairs))  # type: ignore[arg-type]
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"merges.txt does not fit vocab.json: {error}") from error
        self._backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._backend.decoder = tokenizers.decoders.ByteLevel()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in threads."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast([_valid(text) for text in texts])]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        special = self._special.values()
        return self._backend.decode([int(token) for token in ids if token not in special])

    def piece(self, token: int) -> str:
        """GPT-2's way to write a token: each character stands for a byte, `Ġ` for a space."""
        special = {number: name for name, number in self._special.items()}
        return special.get(token) or self._backend.id_to_token(token) or ""

    def hugging_face(self) -> tokenizers.Tokenizer:
        """The same model, which also knows its special tokens."""
        import tokenizers

        # A copy: the one that encodes must not know special tokens, or it would find them in texts.
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens(list(self._special))
        return backend


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder: `tokenizer.model`, as trained here, or GPT-2's `vocab.json` and `merges.txt`.

    Raises:
      UserError: there is no such folder, it holds neither, or its files are broken.
    """
    folder = Path(path)
    if not folder.is_dir():
        reason = "is a file, not the folder of a tokenizer" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {reason}")
    try:
        if (folder / "tokenizer.model").exists():
            return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return ByteLevelTokenizer(
                (folder / "vocab.json").read_bytes(), (folder / "merges.txt").read_bytes(), _added_tokens(folder)
            )
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    found = sorted(entry.name for entry in folder.iterdir())
    listing = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "") if found else "nothing"
    raise UserError(
        f"{folder} holds no tokenizer: expected tokenizer.model, or vocab.json and merges.txt; found {listing}"
    )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, directory: str | Path, *, max_bytes: int = TRAINING_BYTES
) -> Tokenizer:
    """Trains SentencePiece BPE and writes `tokenizer.model`, complete or not at all. Deterministic.

    Args:
      texts: the corpus, in an order whose beginning stands for the whole.
      vocab_size: number of ids; where the corpus yields fewer pieces, the rest is never used.
      directory: folder to write to.
      max_bytes: bytes of UTF-8 after which no more text is read; the default takes a minute and 1.4 GB of memory.

    Raises:
      UserError: the corpus is empty, or `vocab_size` leaves no room for its characters.
    """
    import sentencepiece

    if vocab_size <= _FIRST_LEARNT + 1:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes, <unk> and {EOS} "
            f"leave no room for the corpus's characters"
        )
    sentences = _Sentences(texts, max_bytes)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            minloglevel=2,
            model_type="bpe",
            vocab_size=vocab_size - 1,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=0.9999,
            # Lossless: the text as it is.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # By default no piece could hold "Immunohistochemistry", and long lines would be dropped without a word.
            max_sentencepiece_length=32,
            max_sentence_length=1 << 20,
            # A small corpus cannot fill the vocabulary.
            hard_vocab_limit=False,
        )
    except RuntimeError as error:
        if sentences.failure:
            raise sentences.failure from None
        if not sentences.bytes_read:
            raise UserError("the corpus to train a tokenizer on is empty") from error
        too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if too_small:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small for the characters of this corpus: "
                f"it takes {int(too_small[1]) + 1} or more"
            ) from error
        raise UserError(f"SentencePiece cannot be trained on this corpus: {error}") from error
    tokenizer = SentencePieceTokenizer(_complete(model.getvalue(), vocab_size))
    tokenizer.save(directory)
    return tokenizer


class _Sentences:
    """The corpus as SentencePiece wants it: lines, in which it finds no character that it reserves."""

    def __init__(self, texts: Iterable[str], max_bytes: int):
        self.texts, self.max_bytes = texts, max_bytes
        self.bytes_read = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in map(_valid, self.texts):
                for line in _SENTENCE_ENDS.split(text):
                    yield from _PARTS.findall(line)
                self.bytes_read += len(text.encode())
                if self.bytes_read >= self.max_bytes:
                    return
        except (Exception, KeyboardInterrupt) as error:  # SentencePiece makes a RuntimeError of it
            self.failure = error
            raise


def _complete(model: bytes, vocab_size: int) -> bytes:
    """The model with never used pieces up to `vocab_size`, and the end of text as the last id."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    kinds = proto.SentencePiece.Type
    for index in range(vocab_size - 1 - len(proto.pieces)):
        # A true space is in no text that SentencePiece sees: it cannot merge its way to such a piece.
        proto.pieces.add(piece=f"<unused {index}>", type=kinds.UNUSED)
    proto.pieces.add(piece=EOS, type=kinds.CONTROL)
    proto.trainer_spec.eos_piece = EOS
    # What `decode` makes of <unk>, which no text encodes to: the same as Hugging Face.
    proto.trainer_spec.unk_surface = "<unk>"
    return proto.SerializeToString(deterministic=True)


def export_tokenizer(tokenizer: Tokenizer, directory: str | Path, *, model_max_length: int = 1024) -> None:
    """Writes a folder that `transformers.AutoTokenizer` and `load_tokenizer` both read, to the same ids.

    Args:
      tokenizer: either kind.
      directory: folder to write to; may hold a model.
      model_max_length: positions of the model.
    """
    backend = tokenizer.hugging_face()
    # Padding with the end of text needs no new embedding; the attention mask hides it.
    special = {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": model_max_length,
        # The class's default has token_type_ids, which GPT-2 would add to its embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
        # Lossless, and special tokens cannot be smuggled in by texts.
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "added_tokens_decoder": {
            str(token): {
                "content": added.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token, added in sorted(backend.get_added_tokens_decoder().items())
        },
    }
    _write(
        directory,
        {
            **tokenizer.files,
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": _json_bytes(config),
            "special_tokens_map.json": _json_bytes(special),
        },
    )


def _valid(text: str) -> str:
    return LONE_SURROGATE.sub("\ufffd", text)


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _json_object(content: bytes, name: str) -> dict:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object")
    return value


def _token_ids(content: bytes, name: str) -> dict[str, int]:
    ids = _json_object(content, name)
    if not all(type(token) is int for token in ids.values()):
        raise UserError(f"{name} does not map tokens to numbers")
    return ids


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens beside vocab.json: `added_tokens.json` of older transformers, `added_tokens_decoder` of newer ones."""
    added: dict[str, int] = {}
    config: dict = {}
    if (folder / "added_tokens.json").exists():
        added = _token_ids((folder / "added_tokens.json").read_bytes(), "added_tokens.json")
    if (folder / "tokenizer_config.json").exists():
        config = _json_object((folder / "tokenizer_config.json").read_bytes(), "tokenizer_config.json")
    return added | {entry["content"]: int(token) for token, entry in config.get("added_tokens_decoder", {}).items()}


def _write(directory: str | Path, files: Mapping[str, bytes]) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_file(Path(directory, name), content)


def _train(args: argparse.Namespace) -> None:
    from biomedlm_jax import corpus

    if any(Path(args.output, name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise UserError(f"{args.output} already holds a tokenizer; choose another --output, or remove it")
    files = corpus.expand_globs(args.input)
    tokenizer = train_tokenizer(_corpus_texts(files), args.vocab_size, args.output)
    print(f"{args.output}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint[:16]}")


def _corpus_texts(files: Sequence[str]) -> Iterator[str]:
    """The abstracts of `files`, which the published tokenizer was trained on; if there are none, all of their text."""
    from biomedlm_jax import corpus

    report = corpus.ReadReport()
    texts = corpus.tokenizer_texts(lambda: corpus.read_mixed(files, report))
    first = next(texts, None)
    if first is None:
        raise UserError(
            f"no text to train on in {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}: "
            f"records left out are {dict(report.dropped)}"
        )
    return chain([first], texts)


def _inspect(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.directory)
    # Within text a word follows a space, and its pieces are others.
    rows = [(repr(word), tokenizer.encode(word)) for given in args.words for word in (given, " " + given)]
    width = max(len(word) for word, _ in rows)
    print(f"{'text':{width}}  tokens  pieces")
    for word, ids in rows:
        print(f"{word:{width}}  {len(ids):6}  {' | '.join(map(tokenizer.piece, ids))}")


def _export(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.directory)
    names = ("tokenizer.model", "vocab.json", "tokenizer.json")
    if any(Path(args.output, name).exists() for name in names) and (
        load_tokenizer(args.output).fingerprint != tokenizer.fingerprint
    ):
        raise UserError(f"{args.output} already holds another tokenizer; choose another --output, or remove it")
    export_tokenizer(tokenizer, args.output, model_max_length=args.model_max_length)
    print(f"{args.output}: {tokenizer.vocab_size} tokens, for AutoTokenizer.from_pretrained")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m biomedlm_jax.tokenizer", description="Tokenizers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    formatter = argparse.ArgumentDefaultsHelpFormatter
    train = commands.add_parser("train", help="train SentencePiece on text", formatter_class=formatter)
    train.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="files of The Pile's JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) or of plain text; only "
        "PubMed abstracts are used where there are any",
    )
    train.add_argument("--output", required=True, metavar="DIR", help="folder to write tokenizer.model to")
    train.add_argument("--vocab-size", type=int, default=PUBLISHED_VOCAB_SIZE, metavar="N", help="number of tokens")
    train.set_defaults(run=_train)
    inspect = commands.add_parser("inspect", help="show the pieces of words", formatter_class=formatter)
    inspect.add_argument("directory", metavar="DIR", help="folder of a tokenizer")
    inspect.add_argument("words", nargs="+", metavar="WORD", help="shown alone and after a space")
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser("export", help="write Hugging Face's files", formatter_class=formatter)
    export.add_argument("directory", metavar="DIR", help="folder of a tokenizer")
    export.add_argument("--output", required=True, metavar="DIR", help="folder that AutoTokenizer can read")
    export.add_argument("--model-max-length", type=int, default=1024, metavar="N", help="the model's positions")
    export.set_defaults(run=_export)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
