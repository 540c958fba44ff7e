"""Evaluation, reports, and the whole way of a user: text -> run -> evaluation -> PyTorch."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from biomedlm_jax import convert, load_model, metrics, perplexity, report, synthetic
from biomedlm_jax import evaluate as evaluate_command
from biomedlm_jax import train as train_lib
from biomedlm_jax.corpus import Selection
from biomedlm_jax.errors import UserError
from biomedlm_jax.tokenizer import train_tokenizer

HELD_OUT = [synthetic.generate(index).text for index in range(200, 203)]


def pile_file(path, texts):
    path.write_text(
        "".join(json.dumps({"text": text, "meta": {"pile_set_name": "PubMed Central"}}) + "\n" for text in texts)
    )
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps, and the held-out text that it was evaluated on."""
    folder = tmp_path_factory.mktemp("run")
    texts = [synthetic.generate(index).text for index in range(200)]
    config = tiny.replace(
        model={"vocab_size": 600, "n_positions": 64, "n_embd": 64},
        data={
            "source": "pile",
            "train_files": pile_file(folder / "train.jsonl", texts),
            "eval_files": pile_file(folder / "val.jsonl", HELD_OUT),
        },
        train={"steps": 12, "log_every": 2, "eval_every": 6, "checkpoint_every": 6},
        run={"dir": str(folder / "run")},
    )
    assert train_lib.train(config) == 0
    return folder / "run"


def evaluate(run, files, **options):
    return perplexity.evaluate(run, files, selection=Selection(("PubMed Central",)), batch_size=2, **options)


def test_equals_the_training_run_and_a_sum_over_rows(run):
    results = evaluate(run, [str(run.parent / "val.jsonl")])
    recorded = [line for line in metrics.read_metrics(run) if "eval/loss" in line]
    assert results["loss"] == pytest.approx(recorded[-1]["eval/loss"], abs=1e-5)
    assert evaluate(run, [str(run.parent / "val.jsonl")], step_number=6)["loss"] == pytest.approx(
        recorded[-2]["eval/loss"], abs=1e-5
    )

    model = load_model(run)
    ids = [token for text in HELD_OUT for token in [*model.tokenizer.encode(text), model.tokenizer.eos_id]]
    nll, count = 0.0, 0
    for start in range(0, len(ids), 64):
        row = np.asarray(ids[start : start + 64])
        logits = np.asarray(model(row[None])[0], np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll -= log_probabilities[np.arange(len(row) - 1), row[1:]].sum()
        count += len(row) - 1
    assert results["tokens"] == count and results["documents"] == 3
    assert results["loss"] == pytest.approx(nll / count, abs=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert results["bits_per_byte"] == pytest.approx(
        nll / count * len(ids) / math.log(2) / sum(len(text.encode()) for text in HELD_OUT), rel=1e-4
    )


def test_plain_text_and_the_command(run, tmp_path, subprocess_env):
    (tmp_path / "a.txt").write_text(HELD_OUT[0])
    (tmp_path / "b.txt").write_text(HELD_OUT[1])
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "biomedlm_jax.evaluate",
            "--checkpoint",
            str(run),
            "--data",
            str(tmp_path / "*.txt"),
            "--output",
            str(tmp_path / "results.json"),
        ],
        capture_output=True,
        text=True,
        env=subprocess_env,
        check=True,
    )
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["documents"] == 2
    assert f"perplexity {written['perplexity']:.2f}" in result.stdout
    assert written["loss"] == pytest.approx(evaluate(run, [str(tmp_path / "*.txt")])["loss"], abs=1e-5)


def test_formats_are_told_apart_by_content(run, tmp_path):
    plain = tmp_path / "corpus"
    pile_file(plain, HELD_OUT)
    results, expected = evaluate(run, [str(plain)]), evaluate(run, [str(run.parent / "val.jsonl")])
    assert results["documents"] == 3 and results["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_mistakes_are_named(run, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": 5}\n' * 3)
    with pytest.raises(UserError, match="100.0% of the records are broken.*no text at .*broken.jsonl:1"):
        evaluate(run, [str(tmp_path / "broken.jsonl")])
    shutil.copytree(run, tmp_path / "larger")
    train_tokenizer(HELD_OUT, 900, tmp_path / "larger" / "tokenizer")
    with pytest.raises(UserError, match="the tokenizer has 900 words, and the model 600"):
        evaluate(tmp_path / "larger", [str(run.parent / "val.jsonl")])
    (tmp_path / "empty.txt").write_text(" \n")
    for path, files, message in [
        (tmp_path, ["x"], "is neither the folder of a run .* nor a Hugging Face folder"),
        (run, [str(tmp_path / "none.txt")], "none.txt"),
        (run, [str(tmp_path / "empty.txt")], "no text to evaluate; left out: {'empty': 1}"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate(path, files)


def test_a_folder_that_cannot_be_made_is_named_before_the_work(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    args = [
        "--checkpoint",
        str(run),
        "--task",
        "medqa",
        "--data",
        "none.jsonl",
        "--output",
        str(tmp_path / "file" / "a"),
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate", *args])
    with pytest.raises(UserError, match="--output .*a cannot be made, as .*file is no folder that can be written to"):
        evaluate_command.main()


def test_report_draws_and_prints(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    report.main()
    printed = capsys.readouterr().out
    lines = metrics.read_metrics(run)
    best = min(line["eval/loss"] for line in lines if "eval/loss" in line)
    assert f"{best:.4f}" in printed and "12,288 tokens" in printed
    picture = (run / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    monkeypatch.setattr(sys, "argv", ["report", str(run.parent)])
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        report.main()


def test_a_trained_run_works_in_transformers(run, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["convert", "to-hf", "--checkpoint", str(run), "--output", str(tmp_path / "hf")])
    convert.main()
    ours = load_model(run, compute_dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in HELD_OUT:
        assert tokenizer(text).input_ids == ours.tokenizer.encode(text)
    ids = torch.tensor([ours.tokenizer.encode(HELD_OUT[0])[:40]])
    with torch.no_grad():
        np.testing.assert_allclose(model(ids).logits.numpy(), ours(ids.numpy()), atol=1e-4)
    # Greedy: each token of generate() is the most likely one by our logits.
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    expected = ids[0].tolist()
    while len(expected) < len(generated):
        expected.append(int(np.argmax(ours([expected])[0, -1])))
    assert generated == expected
    assert tokenizer.decode(generated[40:]) == ours.tokenizer.decode(generated[40:])
