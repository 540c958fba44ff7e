"""Heads, losses, gradients and whole runs against the same formats written with transformers and PyTorch."""

import dataclasses

import huggingface_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import questions
from flax import traverse_util

from biomedlm_jax import adaptation, encoding, heads, huggingface, sharding, step, tokenizer
from biomedlm_jax.config import MeshConfig, ModelConfig
from biomedlm_jax.finetune_config import (
    FinetuneConfig,
    FinetuneOptimizerConfig,
    FinetuneTrainConfig,
    LoraConfig,
    TaskConfig,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS, ADDED, COUNT, LENGTH = 300, 3, 12, 96


@pytest.fixture(scope="module")
def vocabulary():
    return huggingface_models.make_tokenizer(WORDS)


def make_config(name, **changes):
    """A small model of fine-tuning without dropout, in float32."""
    words = {"medqa": WORDS + ADDED, "pubmedqa": WORDS, "generation": WORDS + 1}[name]
    groups = {
        "task": TaskConfig(name=name, max_length=LENGTH, max_source_length=30, max_target_length=20),
        "model": ModelConfig(
            vocab_size=words, n_positions=128, n_embd=32, n_layer=2, n_head=4, compute_dtype="float32"
        ),
        "optimizer": FinetuneOptimizerConfig(learning_rate=1e-3),
        "train": FinetuneTrainConfig(steps=6, global_batch_size=8),
    }
    return FinetuneConfig(**{**groups, **changes})


def make_model(config):
    """transformers' GPT-2 of the configuration, and its weights as parameters here."""
    sizes = {name: getattr(config.model, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = huggingface_models.make_model(std=0.1, scale_attn_by_inverse_layer_idx=True, **sizes, **dropout)
    return model, params_of(config, model)


def params_of(config, model):
    state = {name.removeprefix("transformer."): value.detach().numpy() for name, value in model.named_parameters()}
    stacked = {
        path: np.stack([state[name.format(i)] for i in range(config.model.n_layer)]) if "{}" in name else state[name]
        for path, name in huggingface.TENSORS.items()
    }
    return traverse_util.unflatten_dict({path: jnp.array(x) for path, x in stacked.items()}, sep="/")


class ForMultipleChoice(torch.nn.Module):
    """As BioMedLM's finetune/mc describes it: a linear layer over the last token that is no padding."""

    def __init__(self, model, pad_id):
        super().__init__()
        self.transformer, self.pad_id = model.transformer, pad_id
        self.classifier = torch.nn.Linear(model.config.n_embd, 1)

    def forward(self, tokens, labels):
        batch, choices, _ = tokens.shape
        flat = tokens.flatten(0, 1)
        mask = flat != self.pad_id
        hidden = self.transformer(flat, attention_mask=mask.long()).last_hidden_state
        pooled = hidden[torch.arange(len(flat)), mask.sum(dim=1) - 1]
        logits = self.classifier(pooled).view(batch, choices)
        return torch.nn.functional.cross_entropy(logits, labels), logits


def torch_multiple_choice(vocabulary, examples, folder):
    """Rows of the very text, by the exported tokenizer with added tokens."""
    tokenizer.export_tokenizer(vocabulary, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
    theirs.add_special_tokens({"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"})
    assert theirs.convert_tokens_to_ids(["[PAD]", "[CLS]", "[SEP]"]) == [WORDS, WORDS + 1, WORDS + 2]
    texts = [f"{e.question}[SEP] {choice}[SEP]" for e in examples for choice in e.choices]
    ids = theirs(texts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt").input_ids
    return ids.view(len(examples), 4, LENGTH), torch.tensor([example.label for example in examples])


def check(config, objective, params, batch, theirs, loss):
    """Loss within 1e-4; each gradient within 1e-4 of its size."""
    loss.backward()
    ours, grads = jax.value_and_grad(
        lambda params: objective.summed_loss(params, batch, None, None) / objective.count(batch)
    )(params)
    assert float(ours) == pytest.approx(loss.item(), abs=1e-4)
    flat = traverse_util.flatten_dict(grads, sep="/")
    seen = 0
    for name, parameter in theirs.named_parameters():
        bare = name.removeprefix("transformer.")
        if parameter.grad is None or bare == "classifier.bias":
            continue
        if bare in ("classifier.weight", "score.weight"):
            found = flat["score/kernel"].T
        else:
            layer = next((part for part in bare.split(".") if part.isdigit()), None)
            path = {n.format(layer): p for p, n in huggingface.TENSORS.items()}[bare]
            found = flat[path] if layer is None else flat[path][int(layer)]
        seen += 1
        expected = parameter.grad.numpy()
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected) + 1e-7, name
    assert seen == len(huggingface.tensors(config.model)) + ("score" in params)


def head_of(linear):
    return {"score": {"kernel": jnp.array(linear.weight.detach().numpy().T)}}


@pytest.fixture(scope="module")
def one_device():
    return sharding.batch_sharding(sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))


def test_multiple_choice_equals_pytorch(vocabulary, one_device, tmp_path):
    config, examples = make_config("medqa"), questions.multiple_choice(COUNT)
    model, params = make_model(config)
    tokens, labels = torch_multiple_choice(vocabulary, examples, tmp_path)
    theirs = ForMultipleChoice(model, WORDS)
    encoded = encoding.encode(config, vocabulary, examples)
    assert 0 < encoded.cut < COUNT
    assert [row for rows in encoded.rows for row in rows] == [
        [token for token in row if token != WORDS] for row in tokens.flatten(0, 1).tolist()
    ]
    batch = encoded.batch(range(COUNT), COUNT + 4, one_device)
    params |= head_of(theirs.classifier)
    loss, logits = theirs(tokens, labels)
    found = heads.scores(config.model, params, batch.tokens, batch.lengths)[:COUNT]
    np.testing.assert_allclose(found + theirs.classifier.bias.item(), logits.detach(), atol=1e-4)
    check(config, heads.objective(config.model), params, batch, theirs, loss)


def test_classification_equals_transformers(vocabulary, one_device):
    config, examples = make_config("pubmedqa"), questions.classification(COUNT)
    model, params = make_model(config)
    settings = model.config.to_dict() | {"num_labels": 3, "pad_token_id": vocabulary.eos_id}
    theirs = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**settings)).eval()
    theirs.transformer = model.transformer
    texts = [vocabulary.encode(" ".join(e.contexts)) + vocabulary.encode(e.question) for e in examples]
    tokens = torch.full((COUNT, LENGTH), vocabulary.eos_id)
    for row, ids in zip(tokens, texts, strict=True):
        row[: len(ids[:LENGTH])] = torch.tensor(ids[:LENGTH])
    encoded = encoding.encode(config, vocabulary, examples)
    assert encoded.cut == sum(len(ids) > LENGTH for ids in texts) > 0
    batch = encoded.batch(range(COUNT), COUNT + 4, one_device)
    params |= head_of(theirs.score)
    mask = torch.tensor([[i < len(ids) for i in range(LENGTH)] for ids in texts]).long()
    labels = torch.tensor([e.label for e in examples])
    out = theirs(tokens, attention_mask=mask, labels=labels)
    found = heads.scores(config.model, params, batch.tokens, batch.lengths)[:COUNT]
    np.testing.assert_allclose(found, out.logits.detach(), atol=1e-4)
    check(config, heads.objective(config.model), params, batch, theirs, out.loss)


def test_generation_equals_transformers(vocabulary, one_device):
    config, examples = make_config("generation"), questions.generation(COUNT)
    theirs, params = make_model(config)
    encoded = encoding.encode(config, vocabulary, examples)
    assert 0 < encoded.cut < COUNT
    tokens, labels = torch.zeros(COUNT, 128, dtype=torch.long), torch.full((COUNT, 128), -100)
    for row, targets, example in zip(tokens, labels, examples, strict=True):
        source = vocabulary.encode(example.source)[:30] + [WORDS]
        target = vocabulary.encode(example.target)[:20] + [vocabulary.eos_id]
        row[: len(source + target)] = torch.tensor(source + target)
        targets[len(source) : len(source + target)] = torch.tensor(target)
    batch = encoded.batch(range(COUNT), COUNT + 4, one_device)
    loss = theirs(tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss
    check(config, step.language_model(config.model, loss_chunk=16), params, batch, theirs, loss)


# ---- Steps


class Run:
    """A fine-tuning run on a mesh, from given parameters."""

    def __init__(self, config, params, mesh):
        self.config = config
        self.mesh = sharding.make_mesh(mesh, jax.devices()[: mesh.replica * mesh.fsdp])
        self.rows = sharding.batch_sharding(self.mesh)
        trained, self.frozen = adaptation.split(config, params)
        self.state = step.init_state(config, trained)
        self.step = step.jit_train_step(
            config,
            sharding.tree_shardings(self.mesh, self.state),
            self.rows,
            adaptation.objective(config),
            sharding.tree_shardings(self.mesh, self.frozen) if self.frozen else None,
        )

    def losses(self, encoded):
        size, steps = self.config.train.global_batch_size, self.config.train.steps
        found = []
        with jax.set_mesh(self.mesh):
            for batch in encoding.train_batches(encoded, 0, size, 0, steps, self.rows):
                extra = (self.frozen,) if self.frozen else ()
                self.state, values = self.step(self.state, batch, *extra)
                found.append(float(values["train/loss"]))
        return found


def test_a_run_equals_pytorch_with_its_optimizer_and_schedule(vocabulary, tmp_path):
    config, examples = make_config("medqa"), questions.multiple_choice(COUNT)
    model, params = make_model(config)
    tokens, labels = torch_multiple_choice(vocabulary, examples, tmp_path)
    theirs = ForMultipleChoice(model, WORDS)
    params |= head_of(theirs.classifier)
    o, steps = config.optimizer, config.train.steps
    optimizer = torch.optim.AdamW(theirs.parameters(), o.learning_rate, (o.beta1, o.beta2), o.eps, weight_decay=0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 2, steps)
    encoded = encoding.encode(config, vocabulary, examples)
    # Both read the same batches, in the order that is drawn here; the second of an epoch has 4 questions.
    rows = sharding.batch_sharding(sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    place = {str(row): number for number, row in enumerate(encoded.rows)}
    expected = []
    for batch in encoding.train_batches(encoded, 0, 8, 0, steps, rows):
        real = [
            place[str([batch.tokens[i, j, :n].tolist() for j, n in enumerate(batch.lengths[i].tolist())])]
            for i in np.flatnonzero(batch.weights)
        ]
        assert len(real) in (8, 4)
        loss, _ = theirs(tokens[real], labels[real])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), o.clip_norm)
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
    assert len(set(np.round(expected, 3))) > 3
    np.testing.assert_allclose(Run(config, params, MeshConfig(fsdp=1)).losses(encoded), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("pubmedqa", 0),
        *(
            pytest.param(name, rank, marks=pytest.mark.slow)
            for name, rank in (("medqa", 0), ("medqa", 4), ("pubmedqa", 4), ("generation", 0), ("generation", 4))
        ),
    ],
)
def test_meshes_and_accumulation_change_no_loss(vocabulary, name, rank):
    config = make_config(name, lora=LoraConfig(rank=rank))
    examples = getattr(questions, {"medqa": "multiple_choice", "pubmedqa": "classification"}.get(name, name))(COUNT)
    encoded = encoding.encode(config, vocabulary, examples)
    _, params = make_model(config)
    params = adaptation.with_new_parts(config, params)
    if rank:
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x + 0.02 if path[-1].key == "lora_b" else x, params
        )  # zeros would hide the gradient of the other matrix
    plain = Run(config, params, MeshConfig(fsdp=1))
    first = jax.tree.map(np.asarray, plain.state.params)
    expected = plain.losses(encoded)
    parts = dataclasses.replace(config.train, gradient_accumulation_steps=2)
    for mesh, train in ((MeshConfig(replica=2, fsdp=4), config.train), (MeshConfig(fsdp=4), parts)):
        run = Run(dataclasses.replace(config, train=train), params, mesh)
        np.testing.assert_allclose(run.losses(encoded), expected, atol=2e-5)
    # What is trained changed, and nothing else is among it.
    for path, before in traverse_util.flatten_dict(first, sep="/").items():
        after = traverse_util.flatten_dict(plain.state.params, sep="/")[path]
        assert not np.array_equal(before, after), path
        assert not rank or "lora" in path or path == "score/kernel"


def test_lora_is_a_sum_with_the_frozen_matrices(vocabulary, one_device):
    """Merged into them, it gives the same scores."""
    config = make_config("pubmedqa", lora=LoraConfig(rank=4, alpha=8, modules=("c_attn", "c_fc")))
    _, pretrained = make_model(config)
    trained, frozen = adaptation.start(config, pretrained)
    trained = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), trained)
    assert {path[-3] for path in traverse_util.flatten_dict(trained) if "lora" in path} == {"c_attn", "c_fc"}
    batch = encoding.encode(config, vocabulary, questions.classification(COUNT)).batch(range(COUNT), COUNT, one_device)
    beside = heads.scores(
        config.model, {**adaptation.combine(trained, frozen)}, batch.tokens, batch.lengths, lora=config.lora
    )
    whole = adaptation.finish(config, trained, pretrained)
    merged = heads.scores(config.model, whole, batch.tokens, batch.lengths)
    np.testing.assert_allclose(beside, merged, atol=1e-5)
    without = heads.scores(config.model, pretrained | {"score": trained["score"]}, batch.tokens, batch.lengths)
    assert np.abs(merged - without).max() > 1e-2
