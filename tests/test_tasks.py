import csv
import dataclasses
import json

import pyarrow
import pyarrow.parquet
import pytest

from biomedlm_jax.errors import UserError
from biomedlm_jax.tasks import TASKS, Classification, Generation, MultipleChoice

MEDQA = {"question": "Which?", "options": {"A": "this", "B": "that"}, "answer": "that", "answer_idx": "B"}
SENT = {"id": "dev-7", "sent1": "Which?", "sent2": "", "ending0": "this", "ending1": "that", "label": 1}
MEDMCQA = {"id": "x", "question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 4}
PUBMEDQA = {"QUESTION": "Is it?", "CONTEXTS": ["It was.", "It is."], "LABELS": ["A", "B"], "final_decision": "yes"}
BLURB = {"id": "9", "sentence1": "Is it?", "sentence2": "It was. It is.", "label": "no"}
BIOASQ = {"id": "5c", "type": "yesno", "body": "Is it?", "exact_answer": "Yes", "snippets": [{"text": "It is."}]}


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [str(path)]


def read(task, *files):
    return TASKS[task].read([str(file) for file in files])


# ---- What their authors publish


def test_medqa(tmp_path):
    files = write_lines(tmp_path / "dev.jsonl", MEDQA, SENT, SENT | {"id": "dev-8", "sent2": "Or?", "label": None})
    assert read("medqa", *files) == [
        MultipleChoice("dev.jsonl:1", "Which?", ("this", "that"), 1),
        MultipleChoice("dev-7", "Which?", ("this", "that"), 1),
        MultipleChoice("dev-8", "Which? Or?", ("this", "that"), None),
    ]


def test_medmcqa(tmp_path):
    """JSON lines that are named .json; the hidden test set has no cop."""
    hidden = {name: value for name, value in MEDMCQA.items() if name != "cop"} | {"id": "y"}
    assert read("medmcqa", *write_lines(tmp_path / "dev.json", MEDMCQA, hidden)) == [
        MultipleChoice("x", "Which?", ("a", "b", "c", "d"), 3),
        MultipleChoice("y", "Which?", ("a", "b", "c", "d"), None),
    ]


def test_parquet_of_the_hub(tmp_path):
    """Where labels count from 0, and -1 is hidden."""

    def write(name, *records):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), tmp_path / name)
        return tmp_path / name

    file = write("medmcqa.parquet", MEDMCQA | {"cop": 0}, MEDMCQA | {"id": "y", "cop": -1})
    assert [example.label for example in read("medmcqa", file)] == [0, None]
    file = write("mmlu.parquet", {"question": "Which?", "subject": "anatomy", "choices": ["a", "b"], "answer": 1})
    assert read("mmlu", file) == [MultipleChoice("mmlu.parquet:1", "Which?", ("a", "b"), 1)]
    record = {"pubid": 7, "question": "Is it?", "context": {"contexts": ["It is."]}, "final_decision": "yes"}
    assert read("pubmedqa", write("pqa.parquet", record)) == [Classification("7", ("It is.",), "Is it?", 2)]


def test_mmlu(tmp_path):
    for name in ("anatomy", "genetics"):
        with (tmp_path / f"{name}_test.csv").open("w", newline="") as file:
            csv.writer(file).writerow(["One, or\ntwo?", "a", "b", '"c"', "d", "C"])
    assert read("mmlu", tmp_path / "*.csv") == [
        MultipleChoice(f"{name}_test.csv:1", "One, or\ntwo?", ("a", "b", '"c"', "d"), 2)
        for name in ("anatomy", "genetics")
    ]


def test_pubmedqa(tmp_path):
    (tmp_path / "ori.json").write_text(json.dumps({"123": PUBMEDQA, "124": PUBMEDQA | {"final_decision": None}}))
    assert read("pubmedqa", tmp_path / "ori.json") == [
        Classification("123", ("It was.", "It is."), "Is it?", 2),
        Classification("124", ("It was.", "It is."), "Is it?", None),
    ]
    assert read("pubmedqa", *write_lines(tmp_path / "dev.jsonl", BLURB)) == [
        Classification("9", ("It was. It is.",), "Is it?", 1)
    ]


def test_bioasq(tmp_path):
    """Of the questions of all types those answered with yes or no."""
    questions = [BIOASQ, BIOASQ | {"type": "list", "id": "5d"}, BIOASQ | {"id": "5e", "exact_answer": ["no"]}]
    (tmp_path / "golden.json").write_text(json.dumps({"questions": questions}))
    assert read("bioasq", tmp_path / "golden.json") == [
        Classification("5c", ("It is.",), "Is it?", 1),
        Classification("5e", ("It is.",), "Is it?", 0),
    ]
    assert read("bioasq", *write_lines(tmp_path / "dev.jsonl", BLURB))[0].label == 0


def test_generation(tmp_path):
    (tmp_path / "val.source").write_text("a question\nanother\n")
    assert [example.target for example in read("generation", tmp_path / "val.source")] == [None, None]
    (tmp_path / "val.target").write_text("short\nshorter\n")
    assert read("generation", tmp_path / "val.source") == [
        Generation("val.source:1", "a question", "short"),
        Generation("val.source:2", "another", "shorter"),
    ]
    assert read("generation", *write_lines(tmp_path / "val.jsonl", {"source": "a", "target": "b"})) == [
        Generation("val.jsonl:1", "a", "b")
    ]


@pytest.mark.parametrize(
    ("task", "file", "count"),
    [
        ("medqa", "medqa/dev.jsonl", 1272),
        ("medmcqa", "medmcqa/dev_first2000.json", 2000),
        ("mmlu", "mmlu/*.csv", 400),
        ("pubmedqa", "pubmedqa/ori_pqal_train500.json", 500),
    ],
)
def test_real_files(shared_data, task, file, count):
    examples = read(task, shared_data / "qa" / file)
    assert len(examples) == count == len({example.id for example in examples})
    assert all(example.label is not None for example in examples)


def test_both_formats_of_pubmedqa_are_one(shared_data):
    folder = shared_data / "qa" / "pubmedqa"
    # BLURB's text is all parts in one.
    original = {
        example.id: dataclasses.replace(example, contexts=(" ".join(example.contexts),))
        for example in read("pubmedqa", folder / "ori_pqal_train500.json")
    }
    blurb = read("pubmedqa", folder / "train.jsonl", folder / "dev.jsonl")
    assert {example.id: example for example in blurb} == original


# ---- Mistakes


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("medqa", MEDQA | {"answer_idx": "C"}, "the answer 'C' is none of A, B"),
        ("medqa", MEDQA | {"answer": "this"}, "the answer 'this' is not choice B"),
        ("medqa", MEDQA | {"options": ["this", "that"]}, "options must be an object of A, B, ..."),
        ("medqa", MEDQA | {"options": {"A": "this", "C": "that"}}, "options must be an object of A, B, ..."),
        ("medqa", MEDQA | {"options": {"A": "this", "B": ""}}, "choice B is empty"),
        ("medqa", MEDQA | {"options": {"A": "this"}, "answer_idx": "A"}, "there are 1 choices"),
        ("medqa", MEDQA | {"question": " "}, "question is empty"),
        ("medqa", MEDMCQA, "there is no options"),
        ("medqa", SENT | {"label": 2}, "the label 2 is none of 0 to 1"),
        ("medqa", SENT | {"label": True}, "the label True is none of 0 to 1"),
        ("medqa", ["a"], "this is a list and no object"),
        ("medmcqa", MEDMCQA | {"cop": 0}, "the label 0 is none of 1 to 4"),
        ("medmcqa", MEDMCQA | {"opc": None}, "choice C is empty"),
        ("pubmedqa", BLURB | {"label": "perhaps"}, "the label 'perhaps' is none of maybe, no, yes"),
        ("pubmedqa", PUBMEDQA | {"CONTEXTS": []}, "CONTEXTS is no list of texts"),
        ("pubmedqa", PUBMEDQA | {"QUESTION": 7}, "QUESTION or question is a int and no text"),
        ("medqa", SENT | {"sent2": 5}, "sent2 is a int and no text"),
        ("mmlu", {"question": "Which?", "choices": 4, "answer": 1}, "choices is a int and no list"),
        ("bioasq", BIOASQ | {"snippets": []}, "there are no snippets"),
        ("bioasq", BIOASQ | {"snippets": 3}, "snippets is a int and no list"),
        ("generation", ["a", "b"], "this is a list and no object"),
        ("bioasq", BIOASQ | {"exact_answer": ["yes", "no"]}, "is none of no, yes"),
        ("generation", {"target": "a"}, "there is no source"),
    ],
)
def test_a_broken_record_is_named_with_its_place(tmp_path, task, record, message):
    path = tmp_path / "dev.jsonl"
    path.write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError) as error:
        read(task, path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert f"; a record of {task} is " in str(error.value)


def test_rows_of_mmlu(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("q,a,b,c,d,E\n")
    with pytest.raises(UserError, match=r"a.csv:1: the answer 'E' is none of A, B, C, D"):
        read("mmlu", path)
    for letter in ("", "AB"):
        path.write_text(f"q,a,b,c,d,{letter}\n")
        with pytest.raises(UserError, match=rf"a.csv:1: the answer '{letter}' is none of A, B, C, D"):
            read("mmlu", path)
    path.write_text("q,a,b,A\n")
    with pytest.raises(UserError, match=r"a.csv:1: there are 4 fields"):
        read("mmlu", path)
    for record, message in ((5, "this is a int and no row"), ([1, "a", "b", "c", "d", "A"], "the question is a int")):
        (tmp_path / "a.json").write_text(json.dumps([record]))
        with pytest.raises(UserError, match=message):
            read("mmlu", tmp_path / "a.json")


def test_files_of_one_name_in_several_folders(tmp_path):
    for subject in ("anatomy", "genetics"):
        (tmp_path / subject).mkdir()
        (tmp_path / subject / "test.csv").write_text("q,a,b,c,d,A\n")
    assert [example.id for example in read("mmlu", tmp_path / "*/test.csv")] == [
        "anatomy/test.csv:1",
        "genetics/test.csv:1",
    ]


def test_lines_that_end_as_windows_ends_them(tmp_path):
    (tmp_path / "val.source").write_bytes(b"one\r\ntwo\r\n")
    assert [example.source for example in read("generation", tmp_path / "val.source")] == ["one", "two"]


def test_sources_and_targets_must_be_as_many(tmp_path):
    (tmp_path / "val.source").write_text("a\nb\n")
    (tmp_path / "val.target").write_text("a\n")
    with pytest.raises(UserError, match=r"val.source has 2 lines, and .*val.target has 1"):
        read("generation", tmp_path / "val.source")


def test_ids_are_unique_and_files_hold_examples(tmp_path):
    files = write_lines(tmp_path / "dev.jsonl", SENT, SENT)
    with pytest.raises(UserError, match=r"dev.jsonl:2: the id dev-7 was at .*dev.jsonl:1 already"):
        read("medqa", *files)
    (tmp_path / "list.json").write_text(json.dumps({"questions": [BIOASQ | {"type": "list"}]}))
    with pytest.raises(UserError, match=r"list.json: there are no examples of bioasq in it"):
        read("bioasq", tmp_path / "list.json")
