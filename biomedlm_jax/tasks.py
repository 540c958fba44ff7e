"""Downstream tasks: files as their authors publish them, read as questions with choices, labelled texts, or pairs.

A file of a task must be read whole: a broken record is an error with its place, never a count.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from biomedlm_jax import benchmark_files
from biomedlm_jax.corpus import expand_globs, shown
from biomedlm_jax.errors import UserError

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class MultipleChoice:
    """A question, of whose choices one is right."""

    id: str
    question: str
    choices: tuple[str, ...]
    label: int | None
    """Which choice is right, from 0; None where the file does not tell, as in hidden test sets."""


@dataclass(frozen=True)
class Classification:
    """A question about a text, answered by one of the task's labels."""

    id: str
    contexts: tuple[str, ...]
    """The parts of the text."""
    question: str
    label: int | None
    """The number of the task's label; None where the file does not tell."""


@dataclass(frozen=True)
class Generation:
    """A text, and the one to be written from it."""

    id: str
    source: str
    target: str | None
    """None where there is no file of targets."""


Example = MultipleChoice | Classification | Generation


class _Unreadable(Exception):
    """What is wrong with a record."""


@dataclass(frozen=True)
class Task:
    """How the files of a task are read."""

    name: str
    read_record: Callable[[str, Any, Task], Example | None]
    """From a record's key and the record; None is one of another kind of question."""
    formats: str
    """What its records must look like, for messages."""
    labels: tuple[str, ...] = ()
    """Of a classification, in the order of their numbers."""

    def read(self, patterns: Sequence[str]) -> list[Example]:
        """The examples in files, in their order.

        Raises:
          UserError: a pattern matches nothing, a record is broken or of another format, a label is none of the task's
            or of the choices, or an id comes twice; names file and line.
        """
        places: dict[str, str] = {}
        examples = []
        for place, example in self._read(expand_globs(patterns)):
            if example.id in places:
                raise UserError(f"{place}: the id {example.id} was at {places[example.id]} already")
            places[example.id] = place
            examples.append(example)
        if not examples:
            raise UserError(f"{', '.join(map(shown, patterns))}: there are no examples of {self.name} in it")
        return examples

    def _read(self, files: Sequence[str]) -> Iterator[tuple[str, Example]]:
        names = _names(files)
        for file in files:
            for key, record in _records(file):
                place = f"{shown(file)}:{shown(key)}"
                try:
                    example = self.read_record(key, record, self)
                except _Unreadable as error:
                    raise UserError(f"{place}: {error}; a record of {self.name} is {self.formats}") from None
                if example:
                    own_id = example.id or f"{names[file]}:{key}"
                    yield place, dataclasses.replace(example, id=own_id)


def _names(files: Sequence[str]) -> dict[str, str]:
    """What tells files apart: their own names, or where some have the same, also the folders that they do not share."""
    names = {file: os.path.basename(file) for file in files}
    if len(set(names.values())) == len(names):
        return names
    shared = len(os.path.commonprefix([file.split("/")[:-1] for file in files]))
    return {file: "/".join(file.split("/")[shared:]) for file in files}


def _records(file: str) -> Iterator[tuple[str, Any]]:
    if file.endswith(".source"):
        yield from _pairs(file)
        return
    for key, record in benchmark_files.records(file):
        if file.endswith(".parquet") and isinstance(record, dict) and isinstance(record.get("cop"), int):
            # MedMCQA's answer, which its authors count from 1, the Hub's Parquet counts from 0; -1 is hidden.
            record["cop"] = record["cop"] + 1 or None
        yield key, record


# ---- Fields


def _field(record: Any, *names: str) -> Any:
    """The first of these fields that a record has, not None."""
    if not isinstance(record, dict):
        raise _Unreadable(f"this is a {type(record).__name__} and no object")
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise _Unreadable(f"there is no {' or '.join(names)}")


def _text(record: Any, *names: str) -> str:
    value = _field(record, *names)
    if not isinstance(value, str):
        raise _Unreadable(f"{' or '.join(names)} is a {type(value).__name__} and no text")
    if not value.strip():
        raise _Unreadable(f"{' or '.join(names)} is empty")
    return value


def _list(record: Any, *names: str) -> list[Any]:
    value = _field(record, *names)
    if not isinstance(value, list):
        raise _Unreadable(f"{' or '.join(names)} is a {type(value).__name__} and no list")
    return value


def _id(record: dict[str, Any], name: str = "id") -> str:
    """Empty if the record has none of its own."""
    return "" if record.get(name) is None else str(record[name])


def _choices(values: Sequence[Any]) -> tuple[str, ...]:
    for letter, value in zip(LETTERS, values, strict=False):
        if not isinstance(value, str) or not value.strip():
            raise _Unreadable(f"choice {letter} is {'empty' if value in ('', None) else repr(value)}")
    if len(values) < 2:
        raise _Unreadable(f"there are {len(values)} choices")
    return tuple(values)


def _number(value: Any, count: int, first: int = 0) -> int:
    """A label that counts from `first`."""
    if isinstance(value, str) and re.fullmatch(r"\d+", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not first <= value < first + count:
        raise _Unreadable(f"the label {value!r} is none of {first} to {first + count - 1}")
    return value - first


def _letter(value: Any, count: int) -> int:
    letters = list(LETTERS[:count])
    if value not in letters:
        raise _Unreadable(f"the answer {value!r} is none of {', '.join(letters)}")
    return letters.index(value)


def _named(value: Any, labels: Sequence[str]) -> int:
    name = value.strip().lower() if isinstance(value, str) else value
    if name not in labels:
        raise _Unreadable(f"the label {value!r} is none of {', '.join(labels)}")
    return list(labels).index(name)


# ---- Multiple choice


def _medqa(key: str, record: Any, task: Task) -> MultipleChoice:
    if isinstance(record, dict) and "sent1" in record:
        # BioMedLM's, after SWAG's: https://github.com/stanford-crfm/BioMedLM/tree/main/finetune/mc
        question = _text(record, "sent1")
        if record.get("sent2"):
            question += f" {_text(record, 'sent2')}"
        endings = sorted(name for name in record if re.fullmatch(r"ending\d", name))
        choices = _choices([record[name] for name in endings])
        label = None if record.get("label") is None else _number(record["label"], len(choices))
        return MultipleChoice(_id(record), question, choices, label)
    # Its authors': https://github.com/jind11/MedQA
    question, options = _text(record, "question"), _field(record, "options")
    if not isinstance(options, dict) or sorted(options) != list(LETTERS[: len(options)]):
        raise _Unreadable(f"options must be an object of A, B, ..., not {str(options)[:40]!r}")
    letters = sorted(options)
    choices = _choices([options[letter] for letter in letters])
    label = None if record.get("answer_idx") is None else _letter(record["answer_idx"], len(choices))
    if label is not None and record.get("answer") not in (None, choices[label]):
        raise _Unreadable(f"the answer {record['answer']!r} is not choice {letters[label]}")
    return MultipleChoice(_id(record), question, choices, label)


def _medmcqa(key: str, record: Any, task: Task) -> MultipleChoice:
    # https://github.com/medmcqa/medmcqa: JSON lines, named .json
    question = _text(record, "question")
    choices = _choices([record.get(name) for name in ("opa", "opb", "opc", "opd")])
    label = None if record.get("cop") is None else _number(record["cop"], 4, first=1)
    return MultipleChoice(_id(record), question, choices, label)


def _mmlu(key: str, record: Any, task: Task) -> MultipleChoice:
    # https://github.com/hendrycks/test: question,A,B,C,D,letter, without a header
    if isinstance(record, dict):  # as Parquet on the Hub
        choices = _choices(_list(record, "choices"))
        return MultipleChoice("", _text(record, "question"), choices, _number(_field(record, "answer"), len(choices)))
    if not isinstance(record, list):
        raise _Unreadable(f"this is a {type(record).__name__} and no row")
    if len(record) != 6:
        raise _Unreadable(f"there are {len(record)} fields")
    question, letter = record[0], record[-1]
    if not isinstance(question, str):
        raise _Unreadable(f"the question is a {type(question).__name__} and no text")
    if not question.strip():
        raise _Unreadable("the question is empty")
    return MultipleChoice("", question, _choices(record[1:-1]), _letter(letter, 4))


# ---- Classification


def _pubmedqa(key: str, record: Any, task: Task) -> Classification:
    if isinstance(record, dict) and "sentence1" in record:
        return _blurb(record, task)
    # https://github.com/pubmedqa/pubmedqa: {PMID: record}; the Hub's Parquet has a row each
    contexts = _field(record, "CONTEXTS", "context")
    contexts = contexts.get("contexts") if isinstance(contexts, dict) else contexts
    if not isinstance(contexts, list) or not contexts or not all(isinstance(text, str) for text in contexts):
        raise _Unreadable("CONTEXTS is no list of texts")
    decision = record.get("final_decision")
    label = None if decision is None else _named(decision, task.labels)
    own_id = _id(record, "pubid") or key
    return Classification(own_id, tuple(contexts), _text(record, "QUESTION", "question"), label)


def _blurb(record: dict[str, Any], task: Task) -> Classification:
    # https://microsoft.github.io/BLURB: the question is sentence1, the text sentence2
    label = None if record.get("label") is None else _named(record["label"], task.labels)
    return Classification(_id(record), (_text(record, "sentence2"),), _text(record, "sentence1"), label)


def _bioasq(key: str, record: Any, task: Task) -> Classification | None:
    if isinstance(record, dict) and "sentence1" in record:
        return _blurb(record, task)
    # http://participants-area.bioasq.org/datasets: {"questions": [{id, body, type, snippets, exact_answer}]}
    if _text(record, "type") != "yesno":
        return None
    snippets = tuple(_text(snippet, "text") for snippet in _list(record, "snippets"))
    if not snippets:
        raise _Unreadable("there are no snippets")
    answer = record.get("exact_answer")
    answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    label = None if answer is None else _named(answer, task.labels)
    return Classification(_id(record), snippets, _text(record, "body"), label)


# ---- Text generation


def _generation(key: str, record: Any, task: Task) -> Generation:
    source = _text(record, "source")
    return Generation(_id(record), source, None if record.get("target") is None else _text(record, "target"))


def _pairs(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of NAME.source, each with its line of NAME.target if there is that file.

    https://github.com/stanford-crfm/BioMedLM/tree/main/finetune/textgen
    """
    sources = benchmark_files.text_lines(file)
    other = f"{file.removesuffix('source')}target"
    targets = benchmark_files.text_lines(other) if os.path.isfile(other) else [None] * len(sources)
    if len(sources) != len(targets):
        raise UserError(f"{shown(file)} has {len(sources)} lines, and {shown(other)} has {len(targets)}")
    return ((str(i), {"source": s, "target": t}) for i, (s, t) in enumerate(zip(sources, targets, strict=True), 1))


TASKS = {
    task.name: task
    for task in (
        Task("medqa", _medqa, "{question, options: {A, B, ...}, answer_idx} or {sent1, ending0, ending1, ..., label}"),
        Task("medmcqa", _medmcqa, "{question, opa, opb, opc, opd, cop: 1 to 4}"),
        Task("mmlu", _mmlu, "a row of question, A, B, C, D, letter"),
        Task(
            "pubmedqa",
            _pubmedqa,
            "{QUESTION, CONTEXTS, final_decision} or {sentence1, sentence2, label}",
            ("maybe", "no", "yes"),
        ),
        Task(
            "bioasq",
            _bioasq,
            "{body, type, exact_answer, snippets: [{text}]} or {sentence1, sentence2, label}",
            ("no", "yes"),
        ),
        Task("generation", _generation, "{source, target}, or a line of NAME.source and one of NAME.target"),
    )
}
