import json
import logging
import pickle
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from huggingface_models import hf_logits, make_model, make_tokenizer, read_folder, write_folder
from safetensors.numpy import load_file, save_file

from biomedlm_jax import checkpoint, exporting, huggingface, load_model
from biomedlm_jax import config as config_lib
from biomedlm_jax import model as model_lib
from biomedlm_jax.errors import UserError

ODD_SIZES = [
    {"vocab_size": 101, "n_positions": 17, "n_embd": 30, "n_layer": 3, "n_head": 3},
    {"vocab_size": 67, "n_positions": 9, "n_embd": 64, "n_layer": 5, "n_head": 4, "layer_norm_epsilon": 1e-3},
    {
        "vocab_size": 50,
        "n_positions": 12,
        "n_embd": 7,
        "n_layer": 1,
        "n_head": 1,
        "reorder_and_upcast_attn": True,
        "activation_function": "gelu_pytorch_tanh",
    },
]


def bits(value):
    """Bytes that compare equal only if every bit does, in NaNs too."""
    return np.ascontiguousarray(value).tobytes()


def same(tensors, others):
    return tensors.keys() == others.keys() and all(
        value.dtype == others[name].dtype and value.shape == others[name].shape and bits(value) == bits(others[name])
        for name, value in tensors.items()
    )


# ------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("inverse_layer", [True, False])
@pytest.mark.parametrize("sizes", ODD_SIZES, ids=["odd", "deep", "one-head"])
def test_logits_and_gradients_equal_transformers(tmp_path, sizes, inverse_layer):
    torch = pytest.importorskip("torch")
    model = make_model(**sizes, scale_attn_by_inverse_layer_idx=inverse_layer, attn_implementation="eager")
    model.save_pretrained(tmp_path)
    config, params = huggingface.load_params(tmp_path)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, sizes["vocab_size"], (3, sizes["n_positions"]))
    # The gradient of a weighted sum: unlike a loss it lets no error of the logits cancel.
    weights = rng.normal(size=(*tokens.shape, sizes["vocab_size"])).astype(np.float32)

    def weighted_sum(params):
        logits = model_lib.merge(config, params)(jnp.asarray(tokens))
        return (logits * weights).sum(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(weighted_sum, has_aux=True))(params)
    expected = model(torch.tensor(tokens)).logits
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4, rtol=0)
    assert np.abs(expected.detach().numpy()).max() > 1  # or 1e-4 would prove nothing
    (expected * torch.tensor(weights)).sum().backward()
    theirs = {name.removeprefix("transformer."): p.grad.numpy() for name, p in model.named_parameters()}
    flat = traverse_util.flatten_dict(grads, sep="/")
    ours = {tensor.name: np.asarray(tensor.of(flat)) for tensor in huggingface.tensors(config)}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert np.linalg.norm(ours[name] - grad) <= 1e-4 * np.linalg.norm(grad), name


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches_equal_transformers(tmp_path, side):
    model = make_model(scale_attn_by_inverse_layer_idx=True)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(2).integers(0, 101, (3, 14))
    lengths = np.array([14, 9, 1])[:, None]
    mask = np.arange(14) < lengths if side == "right" else np.arange(14) >= 14 - lengths
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    ours = load_model(tmp_path)(tokens, mask, positions)
    theirs = hf_logits(model, tokens, attention_mask=mask.astype(int), position_ids=positions)
    np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], atol=1e-4, rtol=0)
    # And padding changes nothing for what it pads.
    alone = load_model(tmp_path)(tokens[1:2, mask[1]])
    np.testing.assert_allclose(np.asarray(ours)[1, mask[1]], alone[0], atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", ["safetensors", "pytorch"])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 20_000], ids=["whole", "shards"])
def test_round_trip_is_bit_identical(tmp_path, dtype, format, max_shard_bytes):
    torch = pytest.importorskip("torch")
    # As transformers writes it: with its names, index, and every field of its configuration.
    model = make_model(n_embd=24, n_layer=2).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "source", max_shard_size=int(max_shard_bytes))
    source = read_folder(tmp_path / "source")
    assert {str(value.dtype) for value in source.values()} == {dtype}
    huggingface.import_model(tmp_path / "source", tmp_path / "run")
    written = exporting.export(
        tmp_path / "run", tmp_path / "back", dtype=dtype, format=format, max_shard_bytes=max_shard_bytes
    )
    back = tmp_path / "back"
    assert sorted(file.name for file in written.files) == sorted(
        file.name for file in back.iterdir() if file.suffix in (".safetensors", ".bin")
    )
    assert (len(written.files) > 1) == (max_shard_bytes < 1e9)
    for name in ("config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    if format == "safetensors":
        assert same(read_folder(back), source)
        names = sorted(file.name for file in (tmp_path / "source").glob("*.safetensors*"))
        assert names == sorted(file.name for file in back.glob("*.safetensors*"))
        if len(written.files) > 1:
            ours, theirs = (
                json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
                for folder in ("back", "source")
            )
            assert ours["weight_map"] == theirs["weight_map"]
            assert all(
                sum(value.nbytes for value in load_file(file).values()) <= max_shard_bytes for file in written.files
            )
            assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"] == written.total_bytes
    else:
        state = {name: value for file in written.files for name, value in torch.load(file, weights_only=True).items()}
        # Ties as in the published file; transformers' own state_dict has the same names.
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        # And what PyTorch wrote is read again to the same bits.
        huggingface.import_model(back, tmp_path / "run2")
        exporting.export(tmp_path / "run2", tmp_path / "back2", dtype=dtype)
        assert same(read_folder(tmp_path / "back2"), source)


def published_state(model):
    """A state_dict as the published checkpoint's: with buffers of the causal mask and a separate head."""
    torch = pytest.importorskip("torch")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for layer in range(model.config.n_layer):
        size = model.config.n_positions
        state[f"transformer.h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, size, size, dtype=torch.uint8))
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


@pytest.mark.parametrize("bare", [False, True], ids=["prefixed", "bare"])
@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "before-1.6"])
def test_published_layout(tmp_path, caplog, bare, zip_file):
    torch = pytest.importorskip("torch")
    model = make_model()
    state = published_state(model)
    if bare:
        del state["lm_head.weight"]
        state = {name.removeprefix("transformer."): value for name, value in state.items()}
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "unknown_field": {"nested": [1, None, "µ"]},
        "n_ctx": 17,
        "resid_pdrop": 0.25,
        "use_cache": False,
        "summary_type": "mean",
        "layer_norm_epsilon": 1e-3,
        "task_specific_params": {"a": {"b": 1}},
    }
    del config["n_inner"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zip_file)
    with caplog.at_level(logging.WARNING):
        huggingface.import_model(tmp_path, tmp_path / "run")
    assert "lm_head" not in caplog.text
    exporting.export(tmp_path / "run", tmp_path / "back")
    back = read_folder(tmp_path / "back")
    names = [name for name, _ in model.named_parameters()]
    assert sorted(back) == sorted(names)
    assert all(bits(back[name]) == bits(model.state_dict()[name].numpy()) for name in names)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_other_head_is_reported_and_the_embedding_wins(tmp_path, caplog):
    tensors = write_folder(tmp_path)
    head = tensors["transformer.wte.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        huggingface.load_params(tmp_path)
    assert not caplog.records
    head[7, 3] += 0.5
    head[90] -= 0.25
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        _, params = huggingface.load_params(tmp_path)
    assert "lm_head.weight differs from transformer.wte.weight in 2 of 101 rows, by up to 0.5" in caplog.text
    assert same({"": params["wte"]["embedding"]}, {"": tensors["transformer.wte.weight"]})


def test_changed_settings_reach_the_exported_configuration(tmp_path):
    write_folder(tmp_path / "hf", torch_dtype="float32", custom="kept", resid_pdrop=0.1)
    huggingface.import_model(tmp_path / "hf", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("resid_pdrop: 0.1", "resid_pdrop: 0.25"))
    exporting.export(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "out"))
    assert after == {**before, "resid_pdrop": 0.25, "torch_dtype": "bfloat16"}


def test_exported_run_loads_with_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer()
    config = config_lib.Config(
        model=config_lib.ModelConfig(
            vocab_size=tokenizer.vocab_size,
            n_positions=32,
            n_embd=24,
            n_layer=2,
            n_head=2,
            compute_dtype="float32",
            initializer_range=0.2,
        )
    )
    run = tmp_path / "run"
    tokenizer.save(run / "tokenizer")
    config_lib.save_config(config, run / "config.yaml")
    # As training saves them: stacked arrays of JAX, on several steps.
    for step in (3, 10):
        checkpoint.save_params(run, step, model_lib.init_params(config.model, step))
    exporting.export(run, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = ["the patient received aspirin", "Ångström β-blocker\n the tumour"]
    batch = hf_tokenizer(texts, padding=True, return_tensors="pt")
    ids = [tokenizer.encode(text) for text in texts]
    assert [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)] == ids
    ours = load_model(run)([ids[0]])
    np.testing.assert_allclose(ours, hf_logits(model, [ids[0]]), atol=1e-4, rtol=0)
    older = load_model(run, 3)([ids[0]])
    assert np.abs(ours - older).max() > 0.1
    # Greedy decoding there is greedy decoding here, and stops at the end of text.
    with torch.no_grad():
        generated = model.generate(torch.tensor([ids[0]]), max_new_tokens=6, do_sample=False)[0].tolist()
    row = list(ids[0])
    for _ in range(6):
        row.append(int(np.asarray(load_model(run)([row]))[0, -1].argmax()))
        if row[-1] == tokenizer.eos_id:
            break
    assert generated == row
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields.keys() == GPT2_OWN_FIELDS | {"architectures", "model_type", "dtype"}
    assert fields["bos_token_id"] == fields["eos_token_id"] == fields["pad_token_id"] == tokenizer.eos_id
    assert model.generation_config.pad_token_id == model.generation_config.eos_token_id == tokenizer.eos_id


GPT2_OWN_FIELDS = {
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "scale_attn_weights",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "add_cross_attention",
    "tie_word_embeddings",
}


def test_large_values_do_not_become_infinite_in_float16(tmp_path):
    tensors = write_folder(tmp_path / "hf")
    tensors["transformer.h.1.mlp.c_fc.weight"][2, 3] = -7e4
    tensors["transformer.ln_f.bias"][0] = np.nan
    tensors["transformer.ln_f.bias"][1] = np.inf
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    huggingface.import_model(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(UserError, match=r"transformer.h.1.mlp.c_fc.weight has values up to 70000, beyond .* float16"):
        exporting.export(tmp_path / "run", tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
    exporting.export(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    assert same(read_folder(tmp_path / "out"), {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()})


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"n_inner": 64}, "n_inner is 64"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"n_embd": "30"}, "n_embd is '30'"),
        ({"n_layer": True}, "n_layer is True"),
        ({"n_head": 4}, "n_head must divide"),
    ],
)
def test_models_that_cannot_be_computed_are_refused(tmp_path, change, message):
    write_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        huggingface.import_model(tmp_path, tmp_path / "run")
    assert not list(tmp_path.glob("run*"))


def test_missing_configuration_fields_mean_what_they_mean_to_transformers():
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GPT2Config().to_dict()
    ours = {name: value for name, value in huggingface.GPT2_CONFIG.items() if name in GPT2_OWN_FIELDS}
    assert ours == {name: defaults[name] for name in GPT2_OWN_FIELDS}


def test_the_task_of_an_export(tmp_path):
    write_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def read(told):
        (tmp_path / "config.json").write_text(json.dumps(config | {"task_specific_params": told}))
        return huggingface.read_task(tmp_path)

    # GPT-2's own configuration has the first.
    for told in ({"text-generation": {"do_sample": True, "max_length": 50}}, None, [], {}):
        assert read(told) is None
    longest = config["n_positions"]
    task = read({"medqa": {"max_length": longest, "truncation_side": "left"}})
    assert (task.task.name, task.task.max_length, task.task.truncation_side) == ("medqa", longest, "left")
    assert task.model == huggingface.read_config(tmp_path)
    for wrong in ({"max_lenght": 64}, {"max_length": 1}, {"max_length": "64"}, 3):
        with pytest.raises(UserError, match=r"config.json: task_specific_params"):
            read({"medqa": wrong})


def test_all_wrong_tensors_are_listed_at_once(tmp_path):
    tensors = write_folder(tmp_path)
    del tensors["transformer.h.1.ln_2.bias"], tensors["transformer.wpe.weight"]
    tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].T.copy()
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].astype(np.float64)
    tensors["transformer.h.3.ln_1.bias"] = np.zeros(30, np.float32)
    tensors["score.weight"] = np.zeros((2, 30), np.float32)
    tensors["wte.weight"] = tensors["transformer.wte.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as raised:
        huggingface.load_params(tmp_path)
    lines = {line.strip() for line in str(raised.value).splitlines()[1:]}
    assert lines == {
        "h.1.ln_2.bias is missing",
        "wpe.weight is missing",
        "wte.weight is there twice",
        "h.0.mlp.c_fc.weight has shape (120, 30), not (30, 120)",
        "h.3.ln_1.bias is no tensor of this model",
        "score.weight is no tensor of this model",
        "ln_f.bias has type F64, not float32, bfloat16, float16",
    }


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_no_pickle_is_executed(tmp_path, legacy, nested):
    torch = pytest.importorskip("torch")
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    target = tmp_path / "executed"
    payload = {"transformer.wte.weight": torch.zeros(2), "x": Malicious(target)} if nested else Malicious(target)
    torch.save(payload, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="pytorch_model.bin is refused"):
        huggingface.load_params(tmp_path)
    assert not target.exists()
    # The test is able to fail: the same file, trusted, does it.
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert target.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02}.", pickle.dumps([1, 2]), pickle.dumps({"a": 1})])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_files_are_refused(tmp_path, name, content):
    if name.endswith("bin"):
        pytest.importorskip("torch")
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        huggingface.load_params(tmp_path)


def test_truncated_safetensors_are_refused(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        huggingface.load_params(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, "a\\b"])
def test_an_index_cannot_leave_its_folder(tmp_path, name):
    folder = tmp_path / "hf"
    write_folder(folder)
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(UserError, match="outside of its folder"):
        huggingface.load_params(folder)


def test_broken_folders_are_explained(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        huggingface.load_params(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        huggingface.load_params(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match="files that are missing: model-00001-of-00002.safetensors"):
        huggingface.load_params(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        huggingface.load_params(tmp_path)


def test_an_export_is_complete_or_not_there(tmp_path, monkeypatch):
    write_folder(tmp_path / "hf")
    huggingface.import_model(tmp_path / "hf", tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UserError, match="already exists and is not empty"):
        exporting.export(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / "precious").unlink()
    # Somebody's, whatever its name.
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_write_configs", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            exporting.export(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out", "out.partial", "run"]
    assert not list((tmp_path / "out").iterdir()) and (tmp_path / "out.partial" / "thesis.txt").exists()
    exporting.export(tmp_path / "hf" / ".." / "run", tmp_path / "hf" / ".." / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_damaged_checkpoints_are_explained(tmp_path):
    write_folder(tmp_path / "hf")
    huggingface.import_model(tmp_path / "hf", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(re.sub("n_layer: 3", "n_layer: 4", path.read_text()))
    with pytest.raises(UserError, match=r"h/ln_1/scale has shape \(3, 30\), not the configuration's \(4, 30\)"):
        exporting.export(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run" / "checkpoints" / "0" / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        exporting.export(tmp_path / "run", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- memory

MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
from biomedlm_jax import checkpoint, config, exporting, huggingface

model = config.ModelConfig(vocab_size=5000, n_positions=64, n_embd=448, n_layer=32, n_head=4)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
if sys.argv[1] == "make":
    run = Path(sys.argv[2])
    run.mkdir()
    arrays = huggingface.create_checkpoint(run, model)
    for tensor in huggingface.tensors(model):
        tensor.of(arrays).write(np.full(tensor.shape, 0.5, np.float32)).result()  # cheap to compress
    config.save_config(config.Config(model=model), run / checkpoint.CONFIG_FILE)
else:
    {"export": exporting.export, "import": huggingface.import_model}[sys.argv[1]](*sys.argv[2:])
print((peak() - before) / 4 / sum(np.prod(shape) for shape in huggingface.parameter_shapes(model).values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in other units elsewhere")
def test_memory_does_not_grow_with_the_model(tmp_path, subprocess_env):
    run, hf = str(tmp_path / "run"), str(tmp_path / "hf")
    for args in (["make", run], ["export", run, hf], ["import", hf, str(tmp_path / "run2")]):
        result = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, *args],
            env=subprocess_env,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Of a model of 320 MB; a single copy would be 1, and what is constant is 0.2.
        assert float(result.stdout) < 0.5, args
