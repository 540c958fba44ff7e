"""The command: what it shows, what it writes, and what it refuses."""

import json
import signal
import subprocess
import sys

import pytest
from huggingface_models import make_tokenizer, write_folder

from biomedlm_jax import generate
from biomedlm_jax import tokenizer as tokenizer_lib
from biomedlm_jax.errors import UserError
from biomedlm_jax.load import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer, path = make_tokenizer(), tmp_path_factory.mktemp("model") / "hf"
    write_folder(path, vocab_size=tokenizer.vocab_size)
    tokenizer_lib.export_tokenizer(tokenizer, path)
    return path


@pytest.fixture
def command(folder, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["generate", "--checkpoint", str(folder), *map(str, args)])
        generate.main()
        out, err = capsys.readouterr()
        assert err.count("no medical advice") == 1
        return out

    return run


def greedy(folder, prompt, count):
    """A token at a time, from the whole text each time."""
    model = load_model(folder)
    ids = model.tokenizer.encode(prompt)
    new = []
    while len(new) < count:
        new.append(int(model([ids + new])[0, -1].argmax()))
        if new[-1] == model.tokenizer.eos_id:
            new.pop()
            break
    return model.tokenizer.decode(new)


def test_one_prompt_is_shown_with_its_text(folder, command):
    assert (
        command("--prompt", "The patient", "--max-new-tokens", 6) == f"The patient{greedy(folder, 'The patient', 6)}\n"
    )


def test_one_prompt_of_a_beam_search_is_shown_when_it_is_whole(folder, command):
    shown = command("--prompt", "The patient", "--max-new-tokens", 4, "--num-beams", 2)
    line = command("--prompt", "The patient", "A", "--max-new-tokens", 4, "--num-beams", 2).splitlines()[0]
    assert shown == f"The patient{json.loads(line)['text']}\n"


def test_a_reader_who_has_seen_enough_ends_the_command_without_a_traceback(folder, subprocess_env):
    args = ["--checkpoint", folder, "--max-new-tokens", "2", "--batch-size", "1", "--prompt", *"abcdefgh"]
    command = [sys.executable, "-m", "biomedlm_jax.generate", *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=subprocess_env
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE and "Traceback" not in said and "Error" not in said


def test_several_prompts_are_json_lines(folder, command, tmp_path):
    prompts = ["The patient", "A", "Results: the"]
    lines = [
        json.loads(line)
        for line in command("--prompt", *prompts, "--max-new-tokens", 6, "--batch-size", 2).splitlines()
    ]
    assert [line["prompt"] for line in lines] == prompts
    assert [line["text"] for line in lines] == [greedy(folder, prompt, 6) for prompt in prompts]
    assert all(line["ended"] == (line["tokens"] < 6) for line in lines)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    for name in ("prompts.txt", "prompts.jsonl"):
        output = tmp_path / f"{name}.out"
        assert command("--prompt-file", tmp_path / name, "--max-new-tokens", 6, "--output", output) == ""
        assert [json.loads(line) for line in output.read_text().splitlines()] == lines
    assert not list(tmp_path.glob("*.partial"))


def test_mistakes_write_nothing(command, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text(f"short\r\n\r\n{'long ' * 200}\r\n")
    output = tmp_path / "out.jsonl"
    for args, message in (
        (("--prompt-file", tmp_path / "long.txt", "--max-new-tokens", 2), r"long.txt:3: the prompt has \d+ tokens"),
        (("--prompt", "a", "--num-beams", 2, "--length-penalty", "nan"), "length_penalty must be a finite number"),
        (("--prompt-file", tmp_path / "bad.jsonl"), r"bad.jsonl:2: there is no prompt"),
        (("--prompt-file", tmp_path / "empty.txt"), r"empty.txt: there are no prompts"),
        (("--prompt", ""), "prompt 1 is empty"),
        (("--prompt", "a", "--max-new-tokens", 5000), "shorten the prompt or lower max_new_tokens"),
        (("--prompt", "a", "--batch-size", 0), "--batch-size must be at least 1"),
        (("--prompt", "a", "--temperature", -1), "temperature must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            command(*args, "--output", output)
    with pytest.raises(UserError, match="--output .* is a folder: name a file"):
        command("--prompt", "a", "--output", tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        command("--prompt", "a", "--output", tmp_path / "none" / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "empty.txt", "long.txt"]
