"""Documents packed in a row do not see each other: as if each were read alone, and a program of its own otherwise."""

import dataclasses
import functools
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from biomedlm_jax import config as config_lib
from biomedlm_jax import data, metrics, perplexity, rows, sharding, step, targets
from biomedlm_jax import model as model_lib
from biomedlm_jax import train as train_lib
from biomedlm_jax.config import MeshConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.planning import compiled
from biomedlm_jax.tokenizer import load_tokenizer

EOS = 60


def packed_row(length=48):
    """The end of a document, then documents of 1, 7, 0 and 20 words, and one cut off, each behind an end of text."""
    words = np.random.default_rng(0).integers(0, EOS, length)
    words[[5, 7, 15, 16, 37]] = EOS
    return words.astype(np.int32)


def segments_of(row):
    """The same by hand: lists of ids, of which all but the first begin with the end of text."""
    parts = [[]]
    for token in row.tolist():
        if token == EOS:
            parts.append([])
        parts[-1].append(token)
    return [part for part in parts if part]


def alone(config, params, parts):
    """Logits of each list of ids, read alone: what is behind it in its row is not seen."""
    rows = np.zeros((len(parts), config.n_positions), np.int32)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    logits = np.asarray(jax.jit(model_lib.merge(config, params))(rows))
    return [row[: len(part)] for row, part in zip(logits, parts, strict=True)]


@pytest.mark.parametrize("attention", ["auto", "flash"])
def test_logits_are_those_of_each_document_alone(attention):
    config = tiny.replace(model={"n_positions": 48, "n_embd": 128, "n_head": 2, "attention": attention}).model
    reference = dataclasses.replace(config, attention="reference")
    params = model_lib.init_params(config, 0)
    model = model_lib.merge(config, params)
    row = packed_row()
    padded = np.concatenate([row[:40], np.zeros(8, np.int32)])  # as the last held-out row is
    tokens = np.stack([row, padded])
    segment_ids = data.segment_ids(tokens, EOS)
    logits = np.asarray(jax.jit(lambda tokens, ids: model(tokens, segment_ids=ids))(tokens, segment_ids))
    for found, ids in zip(logits, tokens, strict=True):
        parts = segments_of(ids)
        assert [len(part) for part in parts] == [5, 2, 8, 1, 21, 11]
        np.testing.assert_allclose(found, np.concatenate(alone(reference, params, parts)), atol=2e-5)
    # It is not what the row as a whole gives, but in the first document.
    whole = np.asarray(jax.jit(model)(tokens))
    np.testing.assert_allclose(logits[:, :5], whole[:, :5], atol=2e-5)
    assert abs(logits[:, 5:] - whole[:, 5:]).max() > 1e-2


def test_the_loss_is_the_sum_over_documents_and_counts_the_same_words():
    """Also a document's first word is predicted, from the end of text before it."""
    config = tiny.replace(model={"n_positions": 48})
    params = model_lib.init_params(config.model, 0)
    tokens = packed_row()[None]
    batch = step.Batch(tokens, np.ones_like(tokens, bool), data.segment_ids(tokens, EOS))
    eval_step = jax.jit(functools.partial(step.eval_step, config))
    nll, count = eval_step(params, batch)
    assert count == eval_step(params, step.Batch(batch.tokens, batch.mask))[1] == 47
    parts, expected = segments_of(tokens[0]), 0.0
    for part, following, logits in zip(parts, [*parts[1:], []], alone(config.model, params, parts), strict=True):
        labels = part[1:] + following[:1]  # the last word predicts the end of text
        log_probabilities = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
        expected -= sum(log_probabilities[i, label] for i, label in enumerate(labels))
    assert float(nll) == pytest.approx(expected, rel=1e-5)


def batch_of(config, index=0, document_attention=True):
    batch = tiny.random_batch(config, index)
    tokens = np.where(np.random.default_rng(index).random(batch.tokens.shape) < 0.2, EOS, batch.tokens)
    ids = data.segment_ids(tokens, EOS) if document_attention else None
    return step.Batch(jnp.asarray(tokens), batch.mask, None if ids is None else jnp.asarray(ids))


def test_training_is_the_same_on_any_mesh_and_in_any_parts():
    losses = []
    for mesh, parts in ((MeshConfig(fsdp=1), 1), (MeshConfig(replica=2, fsdp=4), 2)):
        config = tiny.replace(train={"gradient_accumulation_steps": parts}, model={"remat": "full"})
        trainer = tiny.Trainer(config, mesh)
        losses.append([trainer(batch_of(config, index))["train/loss"] for index in range(5)])
    np.testing.assert_allclose(losses[1], losses[0], atol=2e-5)
    trainer = tiny.Trainer(tiny.CONFIG, MeshConfig(fsdp=1))
    whole = [trainer(batch_of(tiny.CONFIG, index, document_attention=False))["train/loss"] for index in range(5)]
    assert np.abs(np.array(whole) - losses[0]).max() > 1e-4


def test_without_it_the_program_is_the_one_that_knows_no_documents():
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])

    def lowered(config, batch):
        state = jax.eval_shape(lambda: step.init_state(config))
        jitted = step.jit_train_step(config, sharding.tree_shardings(mesh, state), sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            return jitted.lower(state, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)).as_text()

    plain = lowered(tiny.CONFIG, tiny.random_batch(tiny.CONFIG, 0))
    on = tiny.replace(data={"document_attention": True})
    # The setting alone changes nothing: what the batch holds does.
    assert lowered(on, batch_of(on, document_attention=False)) == plain
    assert lowered(on, batch_of(on)) != plain

    # Arguments: of a batch without segments, tokens and mask.
    def batch_arguments(text):
        header = text[text.index("@main") :].split("->")[0]
        return header.count("tensor<16x16xi32>"), header.count("tensor<16x16xi1>")

    assert batch_arguments(plain) == (1, 1)
    assert batch_arguments(lowered(on, batch_of(on))) == (2, 1)


@pytest.mark.parametrize("document_attention", [False, True])
def test_the_plan_is_of_the_same_program(document_attention, monkeypatch):
    """What `plan` compiles takes the batches that `train` would read."""
    config = tiny.replace(data={"document_attention": document_attention})
    jitted, traced = unittest.mock.Mock(), RuntimeError("traced")
    jitted.trace.side_effect = traced
    monkeypatch.setattr(step, "jit_train_step", lambda *args: jitted)
    with pytest.raises(RuntimeError, match="traced"):
        compiled.compile_on(config, targets.parse("h100:1x8"), sharding.make_mesh(MeshConfig()))
    planned = jitted.trace.call_args.args[1]
    batch = batch_of(config, document_attention=document_attention)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(lambda x: (x.shape, x.dtype), batch)


def test_a_run_is_evaluated_as_it_was_trained_and_goes_on_so(tmp_path):
    config = tiny.run_config(
        tmp_path / "prepared",
        tmp_path / "run",
        model={
            "vocab_size": 600,
            "n_positions": 64,
            "n_embd": 64,
            "initializer_range": 0.2,
        },  # so that attention matters from the start
        data={"document_attention": True},
        train={"steps": 6, "eval_every": 6, "checkpoint_every": 6},
    )
    assert train_lib.train(config) == 0
    last = metrics.read_metrics(config.run.dir)[-1]
    # The held-out text of the run, as files.
    held_out = rows.open_rows(config.prepared_dir, "eval")
    ids = held_out.read(range(len(held_out))).reshape(-1)[: held_out.tokens].tolist()
    tokenizer, texts = load_tokenizer(config.prepared_dir / "tokenizer"), [[]]
    for token in ids[:-1]:
        if token == held_out.eos_id:
            texts.append([])
        else:
            texts[-1].append(token)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:03}.txt").write_bytes(tokenizer.decode(text).encode())

    def evaluated():
        return perplexity.evaluate(config.run.dir, [str(tmp_path / "texts/*.txt")], batch_size=2)["loss"]

    assert evaluated() == pytest.approx(last["eval/loss"], abs=1e-5)
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("document_attention: true", "document_attention: false"))
    assert abs(evaluated() - last["eval/loss"]) > 1e-4
    with pytest.raises(UserError, match="holds a run with other settings: data.document_attention was False, is True"):
        train_lib.train(config)
    without = tiny.replace(config, data={"document_attention": False})
    assert config_lib.differences(config, without) == ["data.document_attention was True, is False"]
