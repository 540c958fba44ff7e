import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_models import SIZES, write_folder

import biomedlm_jax
from biomedlm_jax import checkpoint, config, huggingface, load_model
from biomedlm_jax import model as model_lib
from biomedlm_jax.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model as a Hugging Face folder and as a run."""
    folder = tmp_path_factory.mktemp("load")
    write_folder(folder / "hf")
    huggingface.import_model(folder / "hf", folder / "run")
    return folder


TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 11))


def test_a_run_and_a_hugging_face_folder_give_the_models_logits(folders):
    model = load_model(folders / "hf")
    logits = model(TOKENS)
    assert logits.shape == (2, 11, 101) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, load_model(str(folders / "run"))(TOKENS))
    expected = model_lib.merge(model.config, model.params)(jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert model.config.n_layer == SIZES["n_layer"]
    with pytest.raises(UserError, match="holds no tokenizer"):
        model.tokenizer  # noqa: B018


def test_steps_of_a_run(tmp_path):
    settings = config.Config(model=config.ModelConfig(**SIZES, compute_dtype="float32"))
    config.save_config(settings, tmp_path / "config.yaml")
    for step in (1, 2):
        checkpoint.save_params(tmp_path, step, model_lib.init_params(settings.model, step))
    first, second = (np.asarray(load_model(tmp_path, step)(TOKENS)) for step in (1, 2))
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(load_model(tmp_path)(TOKENS), second)
    with pytest.raises(UserError, match="no checkpoint of step 3; there are 1, 2"):
        load_model(tmp_path, 3)


def test_token_arrays_of_any_kind(folders):
    model = load_model(folders / "hf")
    logits = model(TOKENS)
    for tokens in (TOKENS.tolist(), jnp.asarray(TOKENS), TOKENS.astype(np.uint8), tuple(map(tuple, TOKENS))):
        np.testing.assert_array_equal(model(tokens), logits)
    np.testing.assert_array_equal(model(TOKENS, np.ones_like(TOKENS)), logits)
    np.testing.assert_array_equal(model(TOKENS, position_ids=np.tile(np.arange(11), (2, 1))), logits)
    shifted = model(TOKENS, position_ids=np.tile(np.arange(11), (2, 1)) + 3)
    assert np.abs(shifted - logits).max() > 0.01


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([1, 2, 3],), r"tokens must have the shape \[batch, seq\], not \[3\]"),
        (([[]],), r"tokens must have the shape"),
        (([[1, 2], [3]],), "rows of different lengths"),
        (([[0.5]],), "tokens must be integers, not float64"),
        (([[True]],), "tokens must be integers, not bool"),
        (([[3, 101]],), "tokens: 101 is out of the vocabulary, 0 to 100"),
        (([[-1]],), "tokens: -1 is out of the vocabulary"),
        (([[2**40]],), "tokens: 1099511627776 is out of the vocabulary"),
        ((np.zeros((1, 18), int),), "18 in a row, and the model reads up to 17"),
        (([[1, 2]], [[1]]), r"attention_mask has shape \[1, 1\], and tokens have \[1, 2\]"),
        (([[1, 2]], [[1, 2]]), "attention_mask: 2 is out of the mask, 0 to 1"),
        (([[1, 2]], None, [[0, 17]]), "position_ids: 17 is out of the model's positions, 0 to 16"),
    ],
)
def test_what_the_model_cannot_take_is_refused(folders, args, message):
    with pytest.raises(UserError, match=message):
        load_model(folders / "hf")(*args)


def test_compute_type(folders, tmp_path):
    exact = load_model(folders / "run")
    rounded = load_model(folders / "run", compute_dtype="bfloat16")
    assert (exact.config.compute_dtype, rounded.config.compute_dtype) == ("float32", "bfloat16")
    difference = np.abs(rounded(TOKENS) - exact(TOKENS)).max()
    assert 0 < difference < 0.1 and rounded(TOKENS).dtype == jnp.float32
    with pytest.raises(UserError, match="compute_dtype must be float32 or bfloat16, not float16"):
        load_model(folders / "run", compute_dtype="float16")
    write_folder(tmp_path, dtype="float16")
    assert load_model(tmp_path).config.compute_dtype == "bfloat16"


def test_other_folders_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="neither the folder of a run"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="has no steps"):
        load_model(folders / "hf", 3)


def test_version_is_the_packages():
    metadata = pytest.importorskip("importlib.metadata")
    assert biomedlm_jax.__version__ == metadata.version("biomedlm_jax")
