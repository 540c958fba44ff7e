"""Hugging Face models that tests share: drawn wide, so that a difference shows."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from biomedlm_jax import tokenizer

SIZES = {"vocab_size": 101, "n_positions": 17, "n_embd": 30, "n_layer": 3, "n_head": 3}


def make_model(std: float = 0.2, seed: int = 0, **config):
    """transformers' GPT-2 with weights, biases and LayerNorms from N(0, std), in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    settings = {**SIZES, "bos_token_id": 0, "eos_token_id": 0, **config}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, std)
    return model


def hf_logits(model, tokens, **kwargs) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in kwargs.items()}
        return model(torch.tensor(tokens), **inputs).logits.numpy()


def write_folder(folder: Path, std: float = 0.1, **changes) -> dict[str, np.ndarray]:
    """A folder in transformers' layout, made without torch; its tensors."""
    config = {"model_type": "gpt2", **SIZES, **changes}
    rng = np.random.default_rng(0)
    d = config["n_embd"]
    layer = {
        "ln_1.weight": (d,),
        "ln_1.bias": (d,),
        "attn.c_attn.weight": (d, 3 * d),
        "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d),
        "attn.c_proj.bias": (d,),
        "ln_2.weight": (d,),
        "ln_2.bias": (d,),
        "mlp.c_fc.weight": (d, 4 * d),
        "mlp.c_fc.bias": (4 * d,),
        "mlp.c_proj.weight": (4 * d, d),
        "mlp.c_proj.bias": (d,),
    }
    shapes = {
        "wte.weight": (config["vocab_size"], d),
        "wpe.weight": (config["n_positions"], d),
        **{f"h.{i}.{name}": shape for i in range(config["n_layer"]) for name, shape in layer.items()},
        "ln_f.weight": (d,),
        "ln_f.bias": (d,),
    }
    tensors = {f"transformer.{name}": rng.normal(0, std, shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def make_tokenizer(vocab_size: int = 300) -> tokenizer.Tokenizer:
    """A tokenizer trained on a few sentences."""
    text = "the patient received aspirin and the tumour was resected after chemotherapy in a randomised trial"
    texts = [text[start:] + "." for start in range(60)]
    with tempfile.TemporaryDirectory() as folder:
        return tokenizer.train_tokenizer(texts, vocab_size, folder)
