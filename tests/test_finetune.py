"""The command from a Hugging Face folder to answers, and back to transformers."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_models
import jax
import numpy as np
import pytest
import questions
from flax import traverse_util

from biomedlm_jax import (
    adaptation,
    checkpoint,
    encoding,
    evaluation,
    exporting,
    finetune,
    huggingface,
    load,
    metrics,
    perplexity,
    program,
    report,
    tokenizer,
)
from biomedlm_jax import config as config_lib
from biomedlm_jax.config import ModelConfig, RunConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import FinetuneConfig, FinetuneOptimizerConfig, FinetuneTrainConfig, TaskConfig
from biomedlm_jax.tasks import TASKS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
WORDS = 300
SIZES = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}


def write_files(folder):
    """Training and dev examples of each kind, in the formats of their authors."""
    kinds = {
        "medmcqa": [
            {"id": e.id, "question": e.question, **dict(zip(("opa", "opb", "opc", "opd"), e.choices, strict=True))}
            | {"cop": e.label + 1}
            for e in questions.multiple_choice(24)
        ],
        "pubmedqa": [
            {
                "id": e.id,
                "sentence1": e.question,
                "sentence2": " ".join(e.contexts),
                "label": ("maybe", "no", "yes")[e.label],
            }
            for e in questions.classification(24)
        ],
        "generation": [{"id": e.id, "source": e.source, "target": e.target} for e in questions.generation(24)],
    }
    for name, records in kinds.items():
        for part, chosen in (("train", records[:16]), ("dev", records[16:])):
            (folder / f"{name}.{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a pretrained model and the files of tasks."""
    folder = tmp_path_factory.mktemp("world")
    model = huggingface_models.make_model(
        std=0.1, vocab_size=WORDS, eos_token_id=WORDS - 1, scale_attn_by_inverse_layer_idx=True, **SIZES
    )
    model.save_pretrained(folder / "base")
    tokenizer.export_tokenizer(huggingface_models.make_tokenizer(WORDS), folder / "base", model_max_length=128)
    write_files(folder)
    return folder


def make_config(world, name, run_dir, **groups):
    base = FinetuneConfig(
        task=TaskConfig(
            name=name,
            train_files=str(world / f"{name}.train.jsonl"),
            eval_files=str(world / f"{name}.dev.jsonl"),
            max_length=96,
            max_source_length=60,
            max_target_length=60,
        ),
        model=ModelConfig(vocab_size=WORDS, **SIZES, compute_dtype="float32", resid_pdrop=0.1),
        optimizer=FinetuneOptimizerConfig(learning_rate=3e-3),
        train=FinetuneTrainConfig(epochs=3, global_batch_size=8, log_every=1),
        run=RunConfig(dir=str(run_dir), init_from=str(world / "base"), tensorboard=False),
    )
    return dataclasses.replace(
        base, **{group: dataclasses.replace(getattr(base, group), **changes) for group, changes in groups.items()}
    )


RUNS = [("medmcqa", 2), ("pubmedqa", 0), ("generation", 2)]


@pytest.fixture(scope="module", params=RUNS, ids=lambda param: f"{param[0]}-{param[1]}")
def run(world, request):
    """A finished run, its task, and LoRA's rank."""
    name, rank = request.param
    folder = world / f"run-{name}-{rank}"
    assert finetune.finetune(make_config(world, name, folder, lora={"rank": rank})) == 0
    return folder, name, rank


def test_a_run_keeps_its_best_and_its_newest_checkpoint(run):
    folder, name, _ = run
    lines = metrics.read_metrics(folder)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    evaluated = {line["step"]: line for line in lines if "eval/loss" in line}
    assert sorted(evaluated) == [2, 4, 6] and evaluated[6]["step"] == 6
    best = max(evaluated, key=lambda step: (evaluated[step].get("eval/accuracy", 0), -evaluated[step]["eval/loss"]))
    assert checkpoint.find_step(folder) == best
    assert {int(path.name) for path in (folder / "checkpoints").iterdir()} == {best, 6}
    config = checkpoint.read_config(folder)
    assert config.train.steps == 6 and config.train.eval_every == 2
    assert config.model.vocab_size == WORDS + {"medmcqa": 3, "pubmedqa": 0, "generation": 1}[name]


def test_a_run_is_reported(run, tmp_path):
    folder, name, _ = run
    lines = metrics.read_metrics(folder)
    text = report.summary(lines)
    assert "3.0 epochs" in text and "examples/s" in text
    assert ("accuracy" in text) == (name != "generation")
    report.draw(lines, name, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_repeats_the_dev_set(run, world):
    folder, name, _ = run
    best = next(line for line in metrics.read_metrics(folder)[::-1] if line["step"] == checkpoint.find_step(folder))
    if name == "generation":
        pytest.importorskip("rouge_score")
    found = evaluation.evaluate(folder, name, [str(world / f"{name}.dev.jsonl")], new_tokens=4)
    assert len(found.predictions) == found.results["examples"] == 8
    if name == "generation":
        assert set(found.predictions[0]) == {"id", "prediction", "gold"}
        return
    assert found.results["accuracy"] == pytest.approx(best["eval/accuracy"])
    assert found.results["log_loss"] == pytest.approx(best["eval/loss"], abs=1e-5)
    right = [line["prediction"] == line["gold"] for line in found.predictions]
    assert np.mean(right) == pytest.approx(best["eval/accuracy"])
    assert all(max(line["scores"], key=line["scores"].get) == line["prediction"] for line in found.predictions)


def test_the_dev_set_is_answered_without_fp8(world, tmp_path):
    """As the model that is chosen by it will answer."""
    config = make_config(world, "pubmedqa", tmp_path / "run")
    model = dataclasses.replace(config.model, compute_dtype="bfloat16", fp8=True)
    assert finetune.finetune(dataclasses.replace(config, model=model)) == 0
    lines = {line["step"]: line for line in metrics.read_metrics(tmp_path / "run") if "eval/loss" in line}
    found = evaluation.evaluate(tmp_path / "run", "pubmedqa", [str(world / "pubmedqa.dev.jsonl")])
    best = lines[checkpoint.find_step(tmp_path / "run")]
    assert found.results["log_loss"] == pytest.approx(best["eval/loss"], abs=1e-5)


def test_exported_models_answer_alike_in_transformers(run, world, tmp_path):
    folder, name, _ = run
    written = exporting.export(folder, tmp_path / "hf")
    theirs_of = {
        "medmcqa": transformers.AutoModelForMultipleChoice,
        "pubmedqa": transformers.AutoModelForSequenceClassification,
        "generation": transformers.AutoModelForCausalLM,
    }[name]
    assert written.loaded_by == theirs_of.__name__
    model = theirs_of.from_pretrained(tmp_path / "hf", trust_remote_code=name == "medmcqa").eval()
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "no medical advice" in card and f"{name}.train.jsonl" in card and str(world) not in card
    if name == "generation":
        ours, ids = load.load_model(folder), encode("a tumour<|startoftext|>", return_tensors="pt").input_ids
        assert ids[0, -1] == WORDS
        with torch.no_grad():
            np.testing.assert_allclose(model(ids).logits, ours(ids.numpy()), atol=1e-4)
        return
    found = evaluation.evaluate(folder, name, [str(world / f"{name}.dev.jsonl")])
    # What was exported knows its task, and answers here, too; it is no base to be converted.
    with pytest.raises(UserError, match=f"was fine-tuned for {name} here and exported"):
        huggingface.import_model(tmp_path / "hf", tmp_path / "back")
    again = evaluation.evaluate(tmp_path / "hf", name, [str(world / f"{name}.dev.jsonl")])
    for line, same in zip(found.predictions, again.predictions, strict=True):
        assert same["prediction"] == line["prediction"]
        assert same["scores"] == pytest.approx(line["scores"], abs=1e-6)
    records = map(json.loads, (world / f"{name}.dev.jsonl").read_text().splitlines())
    for line, record in zip(found.predictions, records, strict=True):
        if name == "medmcqa":
            rows = [f"{record['question']}[SEP] {record[choice]}[SEP]" for choice in ("opa", "opb", "opc", "opd")]
            inputs = encode(rows, padding=True, truncation=True, max_length=96, return_tensors="pt")
            inputs = {key: value[None] for key, value in inputs.items() if key != "token_type_ids"}
        else:
            ids = (encode.encode(record["sentence2"]) + encode.encode(record["sentence1"]))[:96]
            inputs = {"input_ids": torch.tensor([ids])}
            assert model.config.label2id == {"maybe": 0, "no": 1, "yes": 2}
        with torch.no_grad():
            np.testing.assert_allclose(model(**inputs).logits[0], list(line["scores"].values()), atol=1e-4)


def test_a_batch_that_does_not_fit_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "memory_limit", lambda: 1)
    monkeypatch.setattr(finetune, "_starting_state", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(
        UserError, match=r"^1 example a device needs .* not even 1 fits; .* more devices need less, too$"
    ):
        finetune.finetune(make_config(world, "medmcqa", tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_two_processes_learn_as_one(world, tmp_path, subprocess_env):
    config = make_config(world, "medmcqa", tmp_path / "two", lora={"rank": 2})
    config_lib.save_config(config, tmp_path / "config.yaml")
    launcher = [sys.executable, str(ROOT / "launch" / "local" / "run.py"), "--processes", "2", "--devices", "2"]
    done = subprocess.run(
        [*launcher, "--command", "finetune", "--", "--config", str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=subprocess_env | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout
    assert "[0] devices: 2 processes on 1 host" in done.stdout
    assert finetune.finetune(make_config(world, "medmcqa", tmp_path / "one", lora={"rank": 2})) == 0
    for ours, theirs in zip(*(metrics.read_metrics(tmp_path / name) for name in ("two", "one")), strict=True):
        for name in ("train/loss", "eval/loss", "eval/accuracy"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-5)


def test_the_code_of_a_model_card_runs(run, tmp_path, capsys):
    folder, name, _ = run
    exporting.export(folder, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("\n```")[0]
    exec(code, {"FOLDER": str(tmp_path / "hf")})
    said = capsys.readouterr().out
    answers = {"medmcqa": ["ascorbic acid", "sodium chloride"], "pubmedqa": ["maybe", "no", "yes"]}
    assert any(answer in said for answer in answers.get(name, ["A text to be rewritten."]))


def test_a_checkpoint_of_lora_holds_what_was_trained_only(run, world, tmp_path, monkeypatch):
    folder, name, rank = run
    config = checkpoint.read_config(folder)
    state = json.loads((folder / "checkpoints" / "6" / "params" / "_METADATA").read_text())
    saved = {"/".join(eval(key)) for key in state["tree_metadata"]}
    if rank:
        assert saved and all("lora" in path or path == "score/kernel" for path in saved)
        moved = dataclasses.replace(config, run=dataclasses.replace(config.run, init_from=str(tmp_path / "gone")))
        config_lib.save_config(moved, folder / "config.yaml")
        with pytest.raises(UserError, match="holds what LoRA trained beside the weights of run.init_from: .*gone"):
            load.load_params(folder)
        # Beside the run it is found, wherever both are, if it is what it was.
        moved = dataclasses.replace(config, run=dataclasses.replace(config.run, init_from="elsewhere/base"))
        config_lib.save_config(moved, folder / "config.yaml")
        expected = load.load_params(folder)
        base = load.load_params(world / "base")
        other = jax.tree.map(lambda x: x, base) | {"ln_f": jax.tree.map(lambda x: x + 1e-3, base["ln_f"])}
        assert adaptation.checksum(other) != adaptation.checksum(base)
        monkeypatch.setattr(adaptation, "checksum", lambda params: 5)
        with pytest.raises(
            UserError, match="beside the weights of run.init_from: .*base has other weights than it had"
        ):
            load.load_params(folder)
        monkeypatch.undo()
        config_lib.save_config(config, folder / "config.yaml")
        jax.tree.map(np.testing.assert_array_equal, load.load_params(folder), expected)
    whole = traverse_util.flatten_dict(load.load_params(folder), sep="/")
    base = traverse_util.flatten_dict(load.load_params(world / "base"), sep="/")
    assert set(whole) - set(base) == (set() if name == "generation" else {"score/kernel"})
    whole["wte/embedding"] = whole["wte/embedding"][:WORDS]
    changed = {path for path in base if not np.array_equal(whole[path], base[path])}
    assert changed == {path for path in base if not rank or path.endswith("kernel")}


# ---- Stops


def test_stopped_and_resumed_equals_undisturbed(world, tmp_path, monkeypatch):
    def lines(folder):
        return [
            {key: value for key, value in line.items() if not key.startswith("perf/")}
            for line in metrics.read_metrics(folder)
        ]

    config = make_config(world, "pubmedqa", tmp_path / "whole", lora={"rank": 2})
    assert finetune.finetune(config) == 0
    broken = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "broken")))
    advance = metrics.MetricWriter.advance

    def advance_and_stop(self, step):
        advance(self, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(metrics.MetricWriter, "advance", advance_and_stop)
        assert finetune.finetune(broken) == 128 + signal.SIGTERM
    assert checkpoint.find_step(tmp_path / "broken") == 2  # the best so far; step 3 is there, too
    assert finetune.finetune(broken) == 0
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    expected = load.load_params(tmp_path / "whole", 6)
    jax.tree.map(np.testing.assert_array_equal, load.load_params(tmp_path / "broken", 6), expected)
    # Once more: there is nothing left to do.
    assert finetune.finetune(broken) == 0
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")


def test_a_model_to_start_from_is_no_place_for_a_run(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for name in ("base", "hf"):
        before = sorted((tmp_path / name).rglob("*"))
        config = make_config(world, "medmcqa", tmp_path / name, run={"init_from": str(tmp_path / "base")})
        with pytest.raises(UserError, match=f"{name} holds a model to start from: choose another run.dir"):
            finetune.finetune(config)
        assert sorted((tmp_path / name).rglob("*")) == before


def test_left_truncation_and_bfloat16_go_into_an_export(world, tmp_path):
    """An export computes as its run did, and its card cuts as its run does."""
    task = {"truncation_side": "left", "max_length": 24}
    config = make_config(
        world, "medmcqa", tmp_path / "run", task=task, model={"compute_dtype": "bfloat16"}, train={"steps": 2}
    )
    assert finetune.finetune(config) == 0
    exporting.export(tmp_path / "run", tmp_path / "hf")
    dev = [str(world / "medmcqa.dev.jsonl")]
    ours, theirs = (evaluation.evaluate(tmp_path / name, "medmcqa", dev) for name in ("run", "hf"))
    assert ours.predictions == theirs.predictions and ours.results["cut"] == theirs.results["cut"] > 0
    assert (ours.results["step"], theirs.results["step"]) == (2, None)
    assert ours.results["data"] == ["medmcqa.dev.jsonl"]
    assert "| task.truncation_side | left |" in (tmp_path / "hf" / "README.md").read_text()
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    record = json.loads((world / "medmcqa.dev.jsonl").read_text().splitlines()[0])
    ids = encode(f"{record['question']}[SEP] {record['opb']}[SEP]", truncation=True, max_length=24).input_ids
    encoded = encoding.encode(config, load.load_tokenizer(tmp_path / "hf"), TASKS["medmcqa"].read(dev))
    assert ids == encoded.rows[0][1]


def test_patience(world, tmp_path):
    config = make_config(
        world, "medmcqa", tmp_path / "run", optimizer={"learning_rate": 1e-12}, train={"epochs": 40, "patience": 2}
    )
    assert finetune.finetune(config) == 0
    evaluated = [line["step"] for line in metrics.read_metrics(tmp_path / "run") if "eval/loss" in line]
    assert len(evaluated) < 20
    found = checkpoint.Checkpointer(tmp_path / "run", config).metadata(evaluated[-1])
    assert found["evaluations_since"] == 2 and found["best_step"] == evaluated[-3]
    assert finetune.finetune(config) == 0
    assert [line["step"] for line in metrics.read_metrics(tmp_path / "run") if "eval/loss" in line] == evaluated


# ---- Command lines and mistakes


def test_sizes_are_those_of_the_model_to_start_from(world):
    config = finetune.parse_args(["--run.init_from", str(world / "base"), "--task.max_length", "100"])
    expected = ModelConfig(vocab_size=WORDS, **SIZES, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    assert config.model == dataclasses.replace(expected, initializer_range=config.model.initializer_range)
    with pytest.raises(UserError, match="task.max_length is 512, and the model reads 128 tokens"):
        finetune.parse_args(["--run.init_from", str(world / "base")])
    with pytest.raises(UserError, match="run.init_from is not set"):
        finetune.parse_args(["--task.name", "medqa"])
    with pytest.raises(UserError, match="unknown setting task.files; did you mean task.eval_files"):
        finetune.parse_args(["--run.init_from", str(world / "base"), "--task.files", "x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"dir": ""}}, "run.dir is not set"),
        ({"task": {"train_files": ()}}, "task.train_files is not set"),
        ({"task": {"train_files": "none.jsonl"}}, "none.jsonl"),
        ({"model": {"n_embd": 64}}, "model.n_embd is 32 there and 64 here"),
        ({"model": {"vocab_size": 301}}, "model.vocab_size is 301, and .*base has 300 words, which medmcqa makes 303"),
        ({"train": {"global_batch_size": 12}}, "must be a multiple of the 8 devices"),
        ({"task": {"name": "pubmedqa"}}, "medmcqa.train.jsonl:1: .*a record of pubmedqa is"),
    ],
)
def test_mistakes_write_nothing(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        finetune.finetune(make_config(world, "medmcqa", tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_answers_that_are_hidden_cannot_be_learnt(world, tmp_path):
    hidden = json.loads((world / "medmcqa.train.jsonl").read_text().splitlines()[0])
    del hidden["cop"]
    (tmp_path / "test.jsonl").write_text(json.dumps(hidden))
    with pytest.raises(UserError, match="task.train_files .*test.jsonl: example .* has no answer to learn from"):
        finetune.finetune(make_config(world, "medmcqa", tmp_path, task={"train_files": str(tmp_path / "test.jsonl")}))


def test_other_questions_do_not_go_on_with_a_run(world, tmp_path):
    config = make_config(world, "pubmedqa", tmp_path / "run", train={"steps": 1})
    assert finetune.finetune(config) == 0
    other = make_config(world, "pubmedqa", tmp_path / "run", train={"steps": 1}, task={"max_length": 50})
    with pytest.raises(UserError, match="holds a run with other settings: task.max_length was 96, is 50"):
        finetune.finetune(other)
    fewer = (world / "pubmedqa.train.jsonl").read_text().splitlines()[:8]
    (tmp_path / "fewer.jsonl").write_text("\n".join(fewer))
    changed = make_config(
        world,
        "pubmedqa",
        tmp_path / "run",
        train={"steps": 1, "eval_every": 2},
        task={"train_files": str(tmp_path / "fewer.jsonl")},
    )
    with pytest.raises(UserError, match="the rows are not those .* examples_sha256"):
        finetune.finetune(changed)


def test_heads_are_refused_where_they_do_not_fit(run, world, monkeypatch):
    folder, name, _ = run
    if name == "generation":
        return
    other = {"medmcqa": "pubmedqa", "pubmedqa": "medmcqa"}[name]
    with pytest.raises(UserError, match=f"has a head for {name}.*, and {other}.* needs another"):
        evaluation.evaluate(folder, other, [str(world / f"{other}.dev.jsonl")])
    with pytest.raises(UserError, match=f"has a head for {name}.*, and generation needs another"):
        evaluation.evaluate(folder, "generation", [str(world / "generation.dev.jsonl")])
    with pytest.raises(UserError, match="answers by its head: it takes no shots, choices or rule"):
        evaluation.evaluate(folder, name, [str(world / f"{name}.dev.jsonl")], shots=evaluation.Shots())
    with pytest.raises(UserError, match=f"was fine-tuned to answer {name} by a head, and predicts no words"):
        load.load_model(folder)
    with pytest.raises(UserError, match="predicts no words"):
        perplexity.evaluate(folder, [str(world / f"{name}.dev.jsonl")])
    # To start from, only its weights count.
    monkeypatch.setattr(sys, "argv", ["finetune"])
    config = make_config(world, "generation", folder / "next", run={"init_from": str(folder)}, train={"steps": 1})
    model = dataclasses.replace(config.model, vocab_size=load.read_config(folder).vocab_size)
    assert finetune.finetune(dataclasses.replace(config, model=model)) == 0
