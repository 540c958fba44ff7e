import json
import logging
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from huggingface_models import make_tokenizer, read_folder, write_folder

from biomedlm_jax import convert, load_model
from biomedlm_jax import tokenizer as tokenizer_lib
from biomedlm_jax.errors import UserError, run_command


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch):
    """Undoes what `run_command` does to the process, on which other tests rely."""
    package, absl = logging.getLogger("biomedlm_jax"), logging.getLogger("absl")
    state = package.level, package.propagate, list(package.handlers), absl.level
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield
    package.setLevel(state[0])
    package.propagate, package.handlers[:] = state[1], state[2]
    absl.setLevel(state[3])


def command(monkeypatch, *args):
    """The command in this process; its status."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        run_command(convert.main)
    return exit_.value.code or 0


def test_there_and_back(tmp_path, monkeypatch, capsys):
    tokenizer = make_tokenizer()
    tensors = write_folder(tmp_path / "hf", vocab_size=tokenizer.vocab_size, custom={"kept": [1]})
    tokenizer_lib.export_tokenizer(tokenizer, tmp_path / "hf")
    assert command(monkeypatch, "from-hf", "--model", tmp_path / "hf", "--output", tmp_path / "run") == 0
    captured = capsys.readouterr()
    assert "WITHOUT A TOKENIZER" not in captured.err
    assert f"wrote {tmp_path}/run: float32 weights of 0.2 MB" in captured.out
    model = load_model(tmp_path / "run")
    assert model.tokenizer.fingerprint == tokenizer.fingerprint
    assert command(monkeypatch, "to-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "back") == 0
    assert f"from_pretrained('{tmp_path}/back')" in capsys.readouterr().out
    back = read_folder(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (tmp_path / "hf" / "config.json").read_text()
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "back" / name).exists()
    ids = [tokenizer.encode("the patient received")]
    np.testing.assert_array_equal(load_model(tmp_path / "back")(ids), model(ids))


def test_a_model_without_tokenizer_is_converted_with_a_warning(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "hf")
    assert command(monkeypatch, "from-hf", "--model", tmp_path / "hf", "--output", tmp_path / "run") == 0
    assert "WITHOUT A TOKENIZER" in capsys.readouterr().err
    model = load_model(tmp_path / "run")
    with pytest.raises(UserError, match="tokenizer does not exist"):
        print(model.tokenizer)


def test_a_broken_tokenizer_does_not_pass_unnoticed(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"broken")
    assert command(monkeypatch, "from-hf", "--model", tmp_path / "hf", "--output", tmp_path / "run") == 0
    assert "tokenizer.model is no SentencePiece model" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "hf")
    cases = [
        (["from-hf", "--model", tmp_path / "missing", "--output", tmp_path / "run"], "hf download"),
        (["from-hf", "--model", tmp_path, "--output", tmp_path / "run"], "config.json"),
        (["from-hf", "--model", tmp_path / "hf", "--output", tmp_path / "hf"], "already exists and is not empty"),
        (["to-hf", "--checkpoint", tmp_path / "hf", "--output", tmp_path / "out"], "is not the folder of a run"),
    ]
    for args, message in cases:
        assert command(monkeypatch, *args) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    command(monkeypatch, "from-hf", "--model", tmp_path / "hf", "--output", tmp_path / "run")
    assert command(monkeypatch, "to-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "o", "--step", 7) == 2
    assert "no checkpoint of step 7; there are 0" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert command(monkeypatch, "to-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out") == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_help_is_quick_and_imports_nothing_heavy(subprocess_env):
    begin = time.perf_counter()
    script = (
        "import sys; sys.argv = ['convert', 'to-hf', '--help']\nfrom biomedlm_jax import convert\n"
        "try: convert.main()\nexcept SystemExit: assert not {'jax', 'numpy', 'torch'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=subprocess_env, check=True, stdout=subprocess.PIPE, text=True
    )
    assert time.perf_counter() - begin < 5
    for option in ("--checkpoint", "--output", "--step", "--dtype", "--format"):
        assert option in result.stdout
