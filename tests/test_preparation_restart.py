"""Whoever prepares, however many, however often killed: the result is the same, and no work is done twice."""

import contextlib
import functools
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pile
import pytest
import tiny

from biomedlm_jax import config as config_lib
from biomedlm_jax import preparation, rows, synthetic
from biomedlm_jax.errors import UserError
from biomedlm_jax.preparation import choice, shards, tasks
from biomedlm_jax.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards of very different sizes, with duplicates, broken lines and a benchmark's question."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train").mkdir()
    rng = random.Random(8)
    texts = [synthetic.generate(index).text for index in range(8_000)]
    texts[1234] += " which of the following enzymes is most likely to be deficient in this otherwise healthy child"
    question = "Which of the following enzymes is most likely to be deficient in this otherwise healthy child?"
    (folder / "medqa.jsonl").write_text(json.dumps({"question": question}) + "\n")
    start = 0
    for number in range(16):
        size = rng.choice([1, 50, 300, 800])
        lines = [pile.line(text) for text in [*texts[start : start + size], *rng.choices(texts, k=5)]]
        lines.insert(rng.randrange(len(lines)), "{broken\n")
        data = "".join(lines).encode()
        path = folder / "train" / f"{number:02}.jsonl"
        if number % 2:
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            path.write_bytes(data)
        start += size
    return folder


def command(corpus, folder, processes):
    return [
        *(sys.executable, "-m", "biomedlm_jax.prepare", "--config", str(corpus / "config.yaml")),
        *("--data.dir", str(folder), "--data.processes", str(processes)),
    ]


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory, subprocess_env):
    """What one process makes of it in one go."""
    config = tiny.replace(
        model={"vocab_size": 700, "n_positions": 64},
        data={
            "source": "pile",
            "train_files": str(corpus / "train" / "*"),
            "benchmark_files": str(corpus / "medqa.jsonl"),
            "eval_fraction": 0.05,
            "max_bad_fraction": 0.1,
        },
    )
    config_lib.save_config(config, corpus / "config.yaml")
    folder = tmp_path_factory.mktemp("undisturbed") / "rows"
    subprocess.run(command(corpus, folder, 1), env=subprocess_env, check=True, capture_output=True)
    found = contents(folder)
    manifest = rows.read_manifest(folder)
    assert {"duplicate", "contaminated", "not JSON"} == set(manifest["dropped"])
    assert len(found) > 20
    return found


def contents(folder):
    """Every file, without the command, which differs."""
    manifest = rows.read_manifest(folder)
    said = manifest["command"].encode()
    as_json = json.dumps(manifest["command"]).encode()
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(as_json, b"").replace(said, b"")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_changes_nothing(corpus, undisturbed, processes, tmp_path, subprocess_env):
    subprocess.run(command(corpus, tmp_path / "rows", processes), env=subprocess_env, check=True, capture_output=True)
    assert contents(tmp_path / "rows") == undisturbed


def test_killed_at_random_and_started_again(corpus, undisturbed, tmp_path, subprocess_env):
    """Only the first process is killed: its helpers must end by themselves."""
    folder, work = tmp_path / "rows", tmp_path / ".rows.partial"
    rng = random.Random(10)
    before = 0

    def has_done(results):
        return work.exists() and len(list(work.glob("*.json"))) >= results

    for kill in range(10):
        process = subprocess.Popen(
            command(corpus, folder, rng.choice([1, 2, 4])), env=subprocess_env, stderr=subprocess.PIPE
        )
        # Some more of the work, or nothing at all.
        goal = min(before + rng.choice([0, 2, 4, 8]), 40)
        wait_for(functools.partial(has_done, goal), process)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, f"ended before kill {kill}: {process.stderr.read().decode()}"
        process.kill()
        process.wait()
        process.stderr.close()
        before = len(list(work.glob("*.json")))
        assert not folder.exists()
    result = subprocess.run(command(corpus, folder, 2), env=subprocess_env, check=True, capture_output=True, text=True)
    assert "going on" in result.stderr
    assert contents(folder) == undisturbed and not work.exists()


_DIE_AT = """
import os, signal, sys
from biomedlm_jax import errors, prepare
from biomedlm_jax.preparation import finish
module, name = sys.argv.pop(1).split(".")
module = {"finish": finish, "card": finish.card}[module]
setattr(module, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
errors.run_command(prepare.main)
"""


@pytest.mark.parametrize("place", ["finish._join_ends", "finish._check_rows", "card.write", "finish.log_summary"])
def test_killed_while_the_folder_is_put_together(corpus, undisturbed, place, tmp_path, subprocess_env):
    folder = tmp_path / "rows"
    command_line = command(corpus, folder, 1)
    dying = [command_line[0], "-c", _DIE_AT, place, *command_line[3:]]
    assert subprocess.run(dying, env=subprocess_env, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert folder.exists() == (place == "finish.log_summary")
    subprocess.run(command_line, env=subprocess_env, check=True, capture_output=True)
    assert contents(folder) == undisturbed
    assert sorted(os.listdir(tmp_path)) == [".rows.lock", "rows"]


def test_two_commands_share_the_work(corpus, undisturbed, tmp_path, subprocess_env):
    folder = tmp_path / "rows"
    both = []
    for number in (1, 2):
        line = command(corpus, folder, number)
        both.append(subprocess.Popen(line, env=subprocess_env, stderr=subprocess.PIPE, text=True))
        wait_for((tmp_path / ".rows.partial" / "settings.json").exists, both[0])
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("sharing the work" in text for text in said) == 1, said
    assert contents(folder) == undisturbed
    assert sorted(os.listdir(tmp_path)) == [".rows.lock", "rows"]


def test_other_rows_under_preparation_in_the_same_folder_are_refused(corpus, undisturbed, tmp_path, subprocess_env):
    folder, work = tmp_path / "rows", tmp_path / ".rows.partial"
    process = subprocess.Popen(command(corpus, folder, 1), env=subprocess_env, stderr=subprocess.PIPE, text=True)
    try:
        wait_for((work / "index-00000.json").exists, process)
        other = [*command(corpus, folder, 1), "--data.eval_fraction", "0.3"]
        result = subprocess.run(other, env=subprocess_env, capture_output=True, text=True, check=False)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert result.returncode == 2
    assert (
        "another process prepares these rows with eval_fraction 0.05, and this configuration has 0.3" in result.stderr
    )


def test_of_two_settings_at_once_one_is_prepared(corpus, undisturbed, tmp_path, subprocess_env):
    """Both begin in the same moment: whoever is second ends with a message, and the rows are the other's."""
    for attempt in range(3):
        folder = tmp_path / str(attempt) / "rows"
        lines = [command(corpus, folder, 1), [*command(corpus, folder, 1), "--data.eval_fraction", "0.3"]]
        both = [subprocess.Popen(line, env=subprocess_env, stderr=subprocess.PIPE, text=True) for line in lines]
        said = [process.communicate(timeout=120)[1] for process in both]
        codes = [process.returncode for process in both]
        assert sorted(codes) == [0, 2], said
        refused = said[codes.index(2)]
        assert "another process prepares these rows with eval_fraction" in refused or "was prepared with" in refused
        fraction = rows.read_manifest(folder)["settings"]["eval_fraction"]
        assert fraction == (0.05, 0.3)[codes.index(0)]
        if fraction == 0.05:
            assert contents(folder) == undisturbed


def test_nobody_is_alone_between_beginning_and_sharing(tmp_path, subprocess_env):
    """Eight processes, forty times: all holders read what the last one wrote who was alone, all the time."""
    code = (
        "import pathlib, random, sys, time; from biomedlm_jax.files import share_lock; "
        "note = pathlib.Path(sys.argv[1], 'note'); own = sys.argv[2]\n"
        "for _ in range(40):\n"
        "    with share_lock(note.with_name('lock'), lambda: note.write_text(own)):\n"
        "        before = note.read_text()\n"
        "        time.sleep(random.uniform(0, 0.01))\n"
        "        assert note.read_text() == before\n"
        "    time.sleep(random.uniform(0, 0.01))\n"
        "    note.with_name('seen').open('a').write(before + '\\n')"
    )
    many = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(number)], env=subprocess_env)
        for number in range(8)
    ]
    assert [process.wait(timeout=120) for process in many] == [0] * 8
    assert len(set((tmp_path / "seen").read_text().split())) > 1


def test_input_that_differs_between_those_who_share_is_refused(corpus, tmp_path, subprocess_env):
    """A file that is touched after the first began."""
    (tmp_path / "train").mkdir()
    for path in (corpus / "train").iterdir():
        shutil.copyfile(path, tmp_path / "train" / path.name)
    folder, work = tmp_path / "rows", tmp_path / ".rows.partial"
    line = [*command(corpus, folder, 1), "--data.train_files", str(tmp_path / "train" / "*")]
    process = subprocess.Popen(line, env=subprocess_env, stderr=subprocess.PIPE, text=True)
    try:
        wait_for((work / "index-00000.json").exists, process)
        os.utime(tmp_path / "train" / "10.jsonl")
        result = subprocess.run(line, env=subprocess_env, capture_output=True, text=True, check=False)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "another process prepares these rows from other files" in result.stderr and "10.jsonl" in result.stderr


def test_a_result_that_another_process_replaces_is_no_assertion(tmp_path):
    task = tasks.Task(tmp_path, "a", "key", 1, lambda advance: {})
    other = tasks.Task(tmp_path, "a", "another", 1, lambda advance: {})

    def replace_the_first(advance):
        other.attempt(True, advance)
        return {}

    last = tasks.Task(tmp_path, "b", "key", 1, replace_the_first)
    with pytest.raises(UserError, match="another process made the same from other input meanwhile"):
        tasks.run("reading", [task, last], 1)


def test_a_killed_helper_is_named_and_the_command_goes_on(corpus, undisturbed, tmp_path, subprocess_env):
    folder, work = tmp_path / "rows", tmp_path / ".rows.partial"
    process = subprocess.Popen(command(corpus, folder, 2), env=subprocess_env, stderr=subprocess.PIPE, text=True)
    wait_for((work / "index-00000.json").exists, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    helpers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(helpers[0], signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "a process that prepared rows was killed, perhaps for want of memory" in said and "Traceback" not in said
    subprocess.run(command(corpus, folder, 2), env=subprocess_env, check=True, capture_output=True)
    assert contents(folder) == undisturbed


_DIE_WHILE_TELLING = """
import os, pathlib, signal, sys
from biomedlm_jax.errors import UserError
from biomedlm_jax.preparation import tasks

def die(advance):
    class Last(int):
        def __radd__(self, other):
            os.kill(os.getpid(), signal.SIGKILL)
    advance(Last(1))

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    try:
        tasks.run("dying", [tasks.Task(folder, name, name, 1, die) for name in "ab"], 2)
    except UserError as error:
        print(error)
"""


def test_a_helper_that_dies_while_it_tells_of_progress_does_not_hold_up_the_command(tmp_path, subprocess_env):
    (tmp_path / "die.py").write_text(_DIE_WHILE_TELLING)
    command_line = [sys.executable, str(tmp_path / "die.py"), str(tmp_path)]
    done = subprocess.run(command_line, env=subprocess_env, capture_output=True, text=True, check=True, timeout=60)
    assert "a process that prepared rows was killed" in done.stdout


@pytest.fixture
def counted(monkeypatch):
    """Which shards are indexed and encoded."""
    calls = []
    for name in ("index", "encode"):
        original = getattr(shards, name)

        def count(shard, *args, name=name, original=original):
            calls.append((name, shard.number))
            return original(shard, *args)

        monkeypatch.setattr(shards, name, count)
    return calls


def test_a_mended_file_alone_is_read_again(tmp_path, counted):
    config = pile.write_config(tmp_path)
    broken = tmp_path / "train" / "01.jsonl.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="01.jsonl.gz"):
        preparation.ensure_prepared(config)
    assert counted == [("index", 0), ("index", 1), ("index", 2)]
    counted.clear()
    broken.write_bytes(whole)
    preparation.ensure_prepared(config)
    assert counted == [("index", 1), ("encode", 0), ("encode", 1), ("encode", 2)]


@pytest.mark.parametrize("change", ["a word", "a document more", "a document less"])
def test_text_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch, counted, change):
    config = pile.write_config(tmp_path)
    file = tmp_path / "train" / "00.jsonl"
    write_choice = choice.write_choice

    def write_choice_and_change_text(*args):
        result = write_choice(*args)
        lines = file.read_text().splitlines(keepends=True)
        if change == "a word":
            lines[5] = lines[5].replace(" the ", " THE ")
        file.write_text("".join(lines[:-1] if change == "a document less" else [*lines, *lines[: change != "a word"]]))
        return result

    with monkeypatch.context() as patch, pytest.raises(UserError, match="00.jsonl changed while rows were prepared"):
        patch.setattr(choice, "write_choice", write_choice_and_change_text)
        preparation.ensure_prepared(config)
    counted.clear()
    preparation.ensure_prepared(config)
    assert [number for name, number in counted if name == "index"] == [0]
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    unique = list(dict.fromkeys(texts))
    expected = pile.expected_ids([unique, pile.ABSTRACTS[30:]], load_tokenizer(config.prepared_dir / "tokenizer"), 16)
    assert pile.prepared_ids(config.prepared_dir, "train").tolist() == expected


def test_changed_settings_go_on_from_what_still_holds(tmp_path, counted):
    """After an error, another vocabulary or fraction does not read the text anew."""
    config = pile.write_config(tmp_path)
    with pytest.raises(UserError, match="a vocabulary of 100 is too small"):
        preparation.ensure_prepared(tiny.replace(config, model={"vocab_size": 100}))
    assert counted == [("index", number) for number in range(3)]
    counted.clear()
    preparation.ensure_prepared(tiny.replace(config, data={"eval_files": (), "eval_fraction": 0.1}))
    assert counted == [("encode", number) for number in range(2)]


def test_other_benchmarks_after_a_stop_are_named_rightly(tmp_path, monkeypatch):
    """The same texts in other files, in another order: what was found before must not be counted for the wrong one."""
    config = pile.write_config(tmp_path)
    found = [" ".join(text.split()[:30]) for text in (pile.ABSTRACTS[3], pile.ABSTRACTS[40])]
    for name, texts in {"a.txt": found, "b.txt": found[:1], "c.txt": found[1:]}.items():
        (tmp_path / name).write_text("\n".join(texts))

    def prepare(*names):
        files = [str(tmp_path / name) for name in names]
        preparation.ensure_prepared(tiny.replace(config, data={"benchmark_files": files}))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="stop"):
        patch.setattr(choice, "write_choice", lambda *_: (_ for _ in ()).throw(UserError("stop")))
        prepare("a.txt")
    prepare("c.txt", "b.txt")
    contamination = rows.read_manifest(config.prepared_dir)["contamination"]
    assert contamination["left_out"] == {str(tmp_path / "b.txt"): 1, str(tmp_path / "c.txt"): 1}
    assert "00.jsonl: document 4" in contamination["samples"][str(tmp_path / "b.txt")][0]


def test_interrupting_leaves_no_process(corpus, undisturbed, tmp_path, subprocess_env):
    folder, work = tmp_path / "rows", tmp_path / ".rows.partial"
    process = subprocess.Popen(
        command(corpus, folder, 2),
        env=subprocess_env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Which shells ignore in what they start in the background, such as these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for((work / "index-00000.json").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said, said
    with pytest.raises(ProcessLookupError), contextlib.suppress(PermissionError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
