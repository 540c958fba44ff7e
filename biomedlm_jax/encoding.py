"""Examples of downstream tasks as rows of token ids, exactly as BioMedLM's fine-tuning code makes them, and batches.

    multiple choice    question [SEP] choice [SEP], a row for each choice, the choice behind a space
    classification     context question
    generation         source <|startoftext|> target <|endoftext|>

Source: https://github.com/stanford-crfm/BioMedLM/tree/main/finetune. A batch is a function of (examples, seed, step).
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import grain
import numpy as np
from jax.sharding import NamedSharding

from biomedlm_jax.finetune_config import LENGTH_MULTIPLE, FinetuneConfig
from biomedlm_jax.heads import Questions
from biomedlm_jax.sharding import put
from biomedlm_jax.step import Batch
from biomedlm_jax.tasks import Classification, Example, Generation, MultipleChoice
from biomedlm_jax.tokenizer import Tokenizer


def padded_length(longest: int, most: int, whole_chunks: bool = False) -> int:
    """How long rows of a batch are made: powers of two up to 128, then multiples of it, so that few are compiled.

    Args:
      whole_chunks: only multiples of 128, for a loss in chunks.
    """
    whole = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    if whole_chunks or longest > LENGTH_MULTIPLE:
        return min(most, whole)
    return min(most, max(16, 1 << (longest - 1).bit_length()))


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Examples as token ids.

    Attributes:
      examples: the examples themselves.
      rows: of each example, the rows that are read for it.
      labels: of each example, which choice or label is right, -1 where that is not known; of generation, how many
        tokens of its row are given.
      cut: how many examples had a row that was too long.
      n_positions: tokens that the model reads.
    """

    examples: Sequence[Example]
    rows: list[list[list[int]]]
    labels: list[int]
    cut: int
    n_positions: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_generation(self) -> bool:
        """Whether a batch is rows with tokens to be predicted, and not questions with answers."""
        return isinstance(self.examples[0], Generation)

    @functools.cached_property
    def choices(self) -> int:
        """The most rows that an example has."""
        return max(map(len, self.rows))

    @property
    def longest(self) -> int:
        """The number of the example with the longest row, whose batches take most memory."""
        return max(range(len(self)), key=lambda index: max(map(len, self.rows[index])))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of rows and labels, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.rows, self.labels]).encode()).hexdigest()

    @property
    def mean_tokens(self) -> float:
        """Tokens of an example, of all of its rows."""
        return sum(len(row) for rows in self.rows for row in rows) / len(self)

    def description(self, config: FinetuneConfig) -> str:
        """How many examples there are, how long, and how many had to be cut where."""
        longest = max(len(row) for rows in self.rows for row in rows)
        text = f"{len(self):,} examples, rows of up to {longest} tokens, {self.mean_tokens:.0f} tokens an example"
        if self.cut and self.is_generation:
            text += f"; of {self.cut} the end of source or target was cut"
        elif self.cut:
            end = "end" if config.task.truncation_side == "right" else "beginning"
            text += f"; of {self.cut} the {end} was cut to task.max_length {config.task.max_length}"
        return text

    def batch(self, indices: Sequence[int], size: int, sharding: NamedSharding) -> Questions | Batch:
        """Some examples, filled up to `size` with ones that do not count."""
        chosen = [self.rows[index] for index in indices]
        longest = max(len(row) for rows in chosen for row in rows)
        seq = padded_length(longest, self.n_positions, whole_chunks=self.is_generation)
        tokens = np.zeros((size, self.choices, seq), np.int32)
        lengths = np.zeros((size, self.choices), np.int32)
        # Examples that fill up have their choices: a softmax over none has no gradient that is a number.
        lengths[len(indices) :] = 1
        labels = np.zeros(size, np.int32)
        for place, (index, rows) in enumerate(zip(indices, chosen, strict=True)):
            labels[place] = max(self.labels[index], 0)
            for choice, row in enumerate(rows):
                tokens[place, choice, : len(row)] = row
                lengths[place, choice] = len(row)
        counts = np.arange(size) < len(indices)
        if self.is_generation:
            position = np.arange(seq)
            is_target = (position >= labels[:, None]) & (position < lengths) & counts[:, None]
            return Batch(put(tokens[:, 0], sharding), put(is_target, sharding))
        return Questions(*(put(array, sharding) for array in (tokens, lengths, labels, counts.astype(np.float32))))


def encode(config: FinetuneConfig, tokenizer: Tokenizer, examples: Sequence[Example]) -> Encoded:
    """All examples, which are of one kind, as the task's configuration says."""
    made: dict[type, Callable[..., tuple[list[list[list[int]]], list[int], int]]] = {
        MultipleChoice: _choices,
        Classification: _texts,
        Generation: _pairs,
    }
    rows, labels, cut = made[type(examples[0])](config, tokenizer, examples)
    return Encoded(examples, rows, labels, cut, config.model.n_positions)


def added_ids(config: FinetuneConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the task's special tokens, which follow those of the tokenizer unless it has them already."""
    new = [token for token in config.added_tokens if token not in tokenizer.special]
    ids = {**tokenizer.special, **{token: tokenizer.vocab_size + number for number, token in enumerate(new)}}
    return {token: ids[token] for token in config.added_tokens}


def prompt_end(config: FinetuneConfig | None, tokenizer: Tokenizer) -> list[int]:
    """What stands behind a source of a language model that was fine-tuned to write from it; nothing of others."""
    return list(added_ids(config, tokenizer).values()) if config else []


def _choices(config: FinetuneConfig, tokenizer: Tokenizer, examples: Sequence[MultipleChoice]) -> Any:
    sep = added_ids(config, tokenizer)["[SEP]"]
    questions = tokenizer.encode_batch([example.question for example in examples])
    choices = iter(tokenizer.encode_batch([f" {choice}" for example in examples for choice in example.choices]))
    whole = [
        [[*question, sep, *next(choices), sep] for _ in example.choices]
        for question, example in zip(questions, examples, strict=True)
    ]
    return _cut(config, whole, examples)


def _texts(config: FinetuneConfig, tokenizer: Tokenizer, examples: Sequence[Classification]) -> Any:
    contexts = tokenizer.encode_batch([" ".join(example.contexts) for example in examples])
    questions = tokenizer.encode_batch([example.question for example in examples])
    return _cut(config, [[context + question] for context, question in zip(contexts, questions, strict=True)], examples)


def _cut(config: FinetuneConfig, whole: list[list[list[int]]], examples: Sequence[Any]) -> Any:
    limit = config.task.max_length
    part = slice(limit) if config.task.truncation_side == "right" else slice(-limit, None)
    rows = [[row[part] for row in of_example] for of_example in whole]
    labels = [-1 if example.label is None else example.label for example in examples]
    return rows, labels, sum(max(map(len, of_example)) > limit for of_example in whole)


def _pairs(config: FinetuneConfig, tokenizer: Tokenizer, examples: Sequence[Generation]) -> Any:
    start = added_ids(config, tokenizer)["<|startoftext|>"]
    most_source, most_target = config.task.max_source_length, config.task.max_target_length
    sources = tokenizer.encode_batch([example.source for example in examples])
    targets = tokenizer.encode_batch([example.target or "" for example in examples])
    rows, given, cut = [], [], 0
    for source, target in zip(sources, targets, strict=True):
        cut += len(source) > most_source or len(target) > most_target
        source = source[:most_source]
        rows.append([[*source, start, *target[:most_target], tokenizer.eos_id]])
        given.append(len(source) + 1)
    return rows, given, cut


def train_batches(
    encoded: Encoded, seed: int, batch_size: int, start_step: int, stop_step: int, sharding: NamedSharding
) -> Iterator[Questions | Batch]:
    """The batches of steps start_step, ..., stop_step - 1.

    Each epoch is another permutation of the examples; its last batch may hold fewer.
    """
    count = len(encoded)
    per_epoch = -(-count // batch_size)
    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    for step in range(start_step, stop_step):
        epoch, number = divmod(step, per_epoch)
        places = range(number * batch_size, min((number + 1) * batch_size, count))
        yield encoded.batch([cast(int, order[epoch * count + place]) for place in places], batch_size, sharding)


def eval_batches(encoded: Encoded, batch_size: int, sharding: NamedSharding) -> Iterator[Questions | Batch]:
    """All examples once, in order."""
    for start in range(0, len(encoded), batch_size):
        yield encoded.batch(range(start, min(start + batch_size, len(encoded))), batch_size, sharding)
