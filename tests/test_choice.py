"""What becomes of each document, against a slow statement of the same rules; and end to end."""

import collections
import json
import random

import numpy as np
import pile
import pytest
import tiny

from biomedlm_jax import preparation, rows
from biomedlm_jax.corpus import Selection
from biomedlm_jax.errors import UserError
from biomedlm_jax.preparation import choice, shards

Doc = collections.namedtuple("Doc", "shard held_out hash pmid version contaminated")


def random_case(rng):
    """Some files of documents that are often equal, and often versions of each other."""
    n_shards = rng.randint(1, 6)
    names = [f"pubmed26n{number:04}.xml.gz" for number in rng.sample(range(100), n_shards)]
    n_held_out = rng.randint(0, min(2, n_shards - 1))
    # A few low hashes, so that some are held out by their hash.
    hashes = [rng.choice([0, 1 << 63, (1 << 64) - 1]) + number - (number and 30) for number in range(12)]
    hashes = [value % (1 << 64) for value in hashes]
    documents = [
        Doc(
            shard=shard,
            held_out=shard >= n_shards - n_held_out,
            hash=rng.choice(hashes),
            pmid=rng.choice([0, 1, 2, 3, 4]),
            version=rng.randint(1, 3),
            contaminated=rng.random() < 0.2 and shard < n_shards - n_held_out,
        )
        for shard in range(n_shards)
        for _ in range(rng.randint(0, 8))
    ]
    deleted = [[rng.randint(1, 4) for _ in range(rng.choice([0, 0, 0, 1, 2]))] for _ in names]
    return names, documents, deleted


def indexes_of(names, documents, deleted):
    inputs, results, entries = [], [], []
    for number, name in enumerate(names):
        own = [document for document in documents if document.shard == number]
        split = "eval" if any(document.held_out for document in own) else "train"
        inputs.append(shards.Shard(number, split, "pubmed_xml", (f"folder{number}/{name}",), ("",), 0, Selection()))
        results.append(
            {
                "file_documents": [len(own)],
                "deleted": deleted[number],
                "contaminated": [(place, [0]) for place, document in enumerate(own) if document.contaminated],
            }
        )
        entries += [(document.hash, 1, document.pmid, document.version, False) for document in own]
    starts = np.cumsum([0, *(result["file_documents"][0] for result in results)])
    return choice.Indexes(inputs, results, np.array(entries, shards.INDEX), starts)


def expected_choice(names, documents, deleted, config):
    """The rules, one document and one rule at a time."""
    result = [choice.EVAL if document.held_out else choice.TRAIN for document in documents]
    if config.source == "pubmed_xml":
        for place, document in enumerate(documents):
            later = [number for number, name in enumerate(names) if name >= names[document.shard]]
            if document.pmid and any(document.pmid in deleted[number] for number in later):
                result[place] = choice.DELETED
        for place, document in enumerate(documents):
            rivals = [
                (other.version, names[other.shard], number)
                for number, other in enumerate(documents)
                if other.pmid == document.pmid and result[number] != choice.DELETED
            ]
            if document.pmid and result[place] != choice.DELETED and max(rivals)[2] != place:
                result[place] = choice.OLDER
    for place, document in enumerate(documents):
        if config.contaminated == "drop" and document.contaminated and result[place] == choice.TRAIN:
            result[place] = choice.CONTAMINATED
        if result[place] == choice.TRAIN and document.hash < config.eval_fraction * 2**64:
            result[place] = choice.EVAL
    for split in (choice.EVAL, choice.TRAIN):
        seen = set()
        for place, document in enumerate(documents):
            if result[place] == split:
                if document.hash in seen:
                    result[place] = choice.DUPLICATE
                seen.add(document.hash)
    held_out = {document.hash for place, document in enumerate(documents) if result[place] == choice.EVAL}
    for place, document in enumerate(documents):
        if result[place] == choice.TRAIN and document.hash in held_out:
            result[place] = choice.IN_HELD_OUT
    return result


def test_documents_are_chosen_as_the_rules_say():
    rng = random.Random(5)
    seen, refused = collections.Counter(), 0
    for _ in range(2_000):
        names, documents, deleted = random_case(rng)
        config = tiny.replace(
            data={
                "source": rng.choice(["pile", "pubmed_xml"]),
                "train_files": "some",
                "contaminated": rng.choice(["drop", "report"]),
                "eval_fraction": rng.choice([0.0, 0.0, 0.3]),
            }
        ).data
        expected = expected_choice(names, documents, deleted, config)
        try:
            found = choice.choose(config, indexes_of(names, documents, deleted))
        except UserError as error:
            assert "are in data.train_files, too" in str(error)
            refused += 1
            continue
        assert found.tolist() == expected, (names, documents, deleted, config)
        seen.update(expected)
    assert set(seen) == set(range(len(choice.REASONS))) and 0 < refused < 400


def prepared(config):
    """Prepares; the manifest, and the texts of both splits in their order."""
    preparation.ensure_prepared(config)
    folder = config.prepared_dir
    manifest = rows.read_manifest(folder)
    filled = [split for split, counts in manifest["splits"].items() if counts["rows"]]
    return manifest, {split: pile.prepared_texts(folder, split) for split in filled}


def write_shards(folder, shards_of_texts):
    (folder / "train").mkdir()
    for number, texts in enumerate(shards_of_texts):
        (folder / "train" / f"{number:02}.jsonl").write_text("".join(map(pile.line, texts)))
    return tiny.replace(
        model={"vocab_size": 600, "n_positions": 8},
        data={"source": "pile", "train_files": str(folder / "train" / "*"), "dir": str(folder / "prepared")},
    )


def test_equal_documents_are_written_once_and_the_others_named(tmp_path):
    texts = pile.ABSTRACTS
    config = write_shards(tmp_path, [[*texts[:20], texts[3]], [texts[3], texts[20], *texts[20:40]], texts[:5]])
    manifest, found = prepared(config)
    assert manifest["dropped"] == {"duplicate": 8} and manifest["splits"]["train"]["documents"] == 40
    assert sum(found["train"].count(text) for text in texts[:40]) == len(set(found["train"]) & set(texts[:40])) > 35
    file = config.data.train_files.replace("*", "{:02}.jsonl")
    assert manifest["shards"][1]["samples"]["duplicate"] == [
        f"{file.format(1)}: document 1, the same as {file.format(0)}: document 4",
        f"{file.format(1)}: document 3, the same as {file.format(1)}: document 2",
    ]


def test_a_fraction_is_held_out_wherever_it_lies(tmp_path):
    """The same documents in other files, in another order: the same ones are held out."""
    held_out = []
    for name, n_shards in (("a", 1), ("b", 3)):
        (tmp_path / name).mkdir()
        texts = random.Random(n_shards).sample(pile.ABSTRACTS, 60)
        config = write_shards(tmp_path / name, [texts[number::n_shards] for number in range(n_shards)])
        manifest, found = prepared(tiny.replace(config, data={"eval_fraction": 0.2}))
        counts = {split: manifest["splits"][split]["documents"] for split in ("train", "eval")}
        assert sum(counts.values()) == 60 and 4 <= counts["eval"] <= 22
        expected = {text for text in texts if shards.text_hash(text.encode()) < 0.2 * 2**64}
        assert counts["eval"] == len(expected)
        # The ends of files lie apart.
        whole = set(found["eval"]) & set(texts)
        assert whole <= expected and len(expected - whole) <= 2 * n_shards and not expected & set(found["train"])
        held_out.append(expected)
    assert held_out[0] == held_out[1]


def test_a_held_out_file_in_the_training_text_is_refused_and_part_of_one_warned_of(tmp_path, caplog):
    texts = pile.ABSTRACTS
    config = write_shards(tmp_path, [texts[:30], texts[30:50]])
    held_out = tmp_path / "val.jsonl"
    config = tiny.replace(config, data={"eval_files": str(held_out)})
    held_out.write_text("".join(map(pile.line, texts[10:12])))
    with pytest.raises(
        UserError, match=r"all 2 documents of data.eval_files .*val.jsonl are in data.train_files"
    ) as error:
        preparation.ensure_prepared(config)
    assert f"{tmp_path / 'train' / '00.jsonl'}: document 11" in str(error.value)

    held_out.write_text("".join(map(pile.line, [*texts[50:], texts[35]])))
    manifest, found = prepared(config)
    assert manifest["dropped"] == {"in held-out text": 1} and manifest["splits"]["train"]["documents"] == 49
    assert texts[35] in found["eval"] and texts[35] not in found["train"]
    assert f"1 documents of data.eval_files {held_out} are in data.train_files" in caplog.text
    assert f"{tmp_path / 'train' / '01.jsonl'}: document 6" in caplog.text


@pytest.mark.parametrize("action", ["drop", "report"])
def test_text_of_benchmarks_is_left_out_or_reported(tmp_path, caplog, action):
    texts = list(pile.ABSTRACTS[:40])
    question = "Which of the following enzymes is most likely to be deficient in this otherwise healthy young child?"
    texts[7] += " " + question.lower()
    config = write_shards(tmp_path, [texts[:5], texts[5:]])
    benchmark = tmp_path / "medqa.jsonl"
    benchmark.write_text(json.dumps({"question": question, "answer": "A"}) + "\n")
    config = tiny.replace(config, data={"benchmark_files": str(benchmark), "contaminated": action})
    manifest, found = prepared(config)
    assert manifest["splits"]["train"]["documents"] == (39 if action == "drop" else 40)
    assert (texts[7] in found["train"]) == (action == "report")
    assert manifest["dropped"] == ({"contaminated": 1} if action == "drop" else {})
    found_in = {name: manifest["contamination"][name] for name in ("left_out", "kept", "held_out")}
    affected = "left_out" if action == "drop" else "kept"
    assert found_in == dict.fromkeys(found_in, {}) | {affected: {str(benchmark): 1}}
    place = f"{benchmark}:1 in {tmp_path / 'train' / '01.jsonl'}: document 3"
    assert manifest["contamination"]["samples"] == {str(benchmark): [place]}
    assert place in caplog.text and place in (config.prepared_dir / "README.md").read_text()
    with pytest.raises(UserError, match=r"00.jsonl is in data.train_files and in data.benchmark_files"):
        changes = {"benchmark_files": str(tmp_path / "train" / "00.jsonl"), "dir": str(tmp_path / "other")}
        preparation.ensure_prepared(tiny.replace(config, data=changes))


def test_contaminated_documents_are_reported_by_what_became_of_them(tmp_path, caplog):
    """Held out by their hash, twice there, or kept."""
    question = "Which of the following enzymes is most likely to be deficient in this otherwise healthy young child?"
    texts = [f"{text} {question}" for text in pile.ABSTRACTS[:20]]
    config = write_shards(tmp_path, [[*texts, texts[0], *pile.ABSTRACTS[20:]]])
    benchmark = tmp_path / "med|qa.jsonl"
    benchmark.write_text(json.dumps({"question": question}) + '\n{"question": "Too short?"}\n')
    changes = {"benchmark_files": str(benchmark), "contaminated": "report", "eval_fraction": 0.3}
    manifest, _ = prepared(tiny.replace(config, data=changes))
    held_out = sum(shards.text_hash(text.encode()) < 0.3 * 2**64 for text in texts)
    assert 0 < held_out < 20
    found = manifest["contamination"]
    assert (found["kept"], found["held_out"], found["left_out"]) == (
        {str(benchmark): 20 - held_out},
        {str(benchmark): held_out},
        {},
    )
    card = (config.prepared_dir / "README.md").read_text()
    escaped = str(benchmark).replace("|", r"\|")
    assert f"| {escaped} | 2 | 1 | 1 | 1 | 0 | {20 - held_out} | {held_out} | " in card
    assert "13 words in a row" in card and "all words of a text of 8 to 12" in card
    assert "1 of the 2 records of the benchmark" in caplog.text and "they have no text of 8 words" in caplog.text


def test_text_that_is_all_left_out_by_choice_is_named(tmp_path):
    question = "Which of the following enzymes is most likely to be deficient in this otherwise healthy young child?"
    config = write_shards(tmp_path, [[f"{text} {question}" for text in pile.ABSTRACTS[:5]]])
    (tmp_path / "a.txt").write_text(question)
    with pytest.raises(UserError, match=r"no document of data.train_files is left .* left out are {'contaminated': 5}"):
        preparation.ensure_prepared(tiny.replace(config, data={"benchmark_files": str(tmp_path / "a.txt")}))
