import dataclasses
import subprocess
import sys

import pytest

from biomedlm_jax import config as config_lib
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError


def parse(*args):
    return config_lib.parse_args("train", "", list(args))


def test_defaults_are_the_published_model():
    config = Config()
    assert (config.model.vocab_size, config.model.n_embd, config.model.n_head, config.model.n_layer) == (
        28_896,
        2560,
        20,
        32,
    )
    tokens = config.train.steps * config.train.global_batch_size * config.model.n_positions
    assert abs(tokens - 300e9) < 1024 * 1024  # 300e9 tokens, to the step


def test_options_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {n_layer: 3}\noptimizer: {learning_rate: 1e-3}\ndata: {train_files: [a, b]}\n")
    config = parse("--config", str(path), "--model.n_layer", "5", "--data.eval_files", "c/*.zst")
    assert config.model.n_layer == 5
    assert config.optimizer.learning_rate == 1e-3
    assert config_lib.as_paths(config.data.train_files) == ("a", "b")
    assert config_lib.as_paths(config.data.eval_files) == ("c/*.zst",)


def test_saved_configuration_reads_back(tmp_path):
    config = parse(
        "--data.pile_sets", "[PubMed Central]", "--model.n_head", "10", "--run.dir", "a: b # c", "--train.seed", "7"
    )
    config_lib.save_config(config, tmp_path / "config.yaml")
    assert config_lib.load_config(tmp_path / "config.yaml") == config
    assert parse("--config", str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.n_layr", "3"], "unknown setting model.n_layr; did you mean model.n_layer?"),
        (["--modle.n_layer", "3"], "unknown setting modle.n_layer; did you mean model.n_layer?"),
        (["--n_layer", "3"], "unknown setting n_layer; did you mean model.n_layer?"),
        (["--train.steps", "many"], '"train.steps": Expected .*int.*many'),
        (["--model.remat", "some"], '"model.remat": Expected .*none.*matmuls.*full'),
        (["--config", "nowhere.yaml"], "does not exist.*nowhere.yaml"),
        (["--model.n_head", "7"], "model.n_head must divide model.n_embd: 2560 / 7"),
        (
            ["--train.global_batch_size", "10", "--train.gradient_accumulation_steps", "4"],
            "must divide train.global_batch_size: 10 / 4",
        ),
        (["--train.steps", "50"], r"optimizer.warmup_steps \(100\) must be below train.steps \(50\)"),
        (["--train.loss_chunk", "100"], "train.loss_chunk must divide model.n_positions: 1024 / 100"),
        (["--optimizer.beta2", "1"], r"optimizer.beta2 must be in \[0, 1\)"),
        (["--data.source", "pile"], "data.source pile needs data.train_files"),
        (["--model.n_positions", "1"], "model.n_positions must be at least 2"),
        (["--model.layer_norm_epsilon", "-1"], "model.layer_norm_epsilon must be above 0"),
        (["--mesh.fsdp", "0"], "mesh.fsdp must be at least 1"),
        (["--train.keep_last", "0"], "train.keep_last must be at least 1"),
    ],
)
def test_mistakes_are_one_clear_line(args, message):
    with pytest.raises(UserError, match=message) as error:
        parse(*args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {n_lyer: 3}", "unknown setting model.n_lyer; did you mean model.n_layer?"),
        ("modl: {n_layer: 3}", "unknown setting modl.n_layer; did you mean model.n_layer?"),
        ("model: [", "Problems parsing"),
        ("model: {n_layer: two}", "two"),
        ("model: 5", "must have groups of settings"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        config_lib.load_config(path)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match=message):
        parse("--config", str(path))


def test_missing_run_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/config.yaml does not exist"):
        config_lib.load_config(tmp_path / "config.yaml")


def test_differences_name_what_makes_another_run():
    before = Config()
    assert config_lib.differences(before, before) == []
    after = dataclasses.replace(
        before,
        model=dataclasses.replace(before.model, n_layer=4, remat="full"),
        train=dataclasses.replace(before.train, seed=1, log_every=1, profile_steps=3),
    )
    assert config_lib.differences(before, after) == ["model.n_layer was 32, is 4", "train.seed was 0, is 1"]


@pytest.mark.parametrize(
    "command", ["train", "prepare", "evaluate", "convert", "tokenizer", "report", "generate", "finetune"]
)
def test_help_answers_before_heavy_imports(command, subprocess_env):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('biomedlm_jax.{command}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'jax', 'flax', 'orbax', 'grain', 'tensorflow_datasets', 'torch', 'transformers', 'matplotlib'}\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not heavy & loaded, heavy & loaded\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=subprocess_env, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_help_lists_every_setting(subprocess_env):
    result = subprocess.run(
        [sys.executable, "-m", "biomedlm_jax.train", "--help"],
        capture_output=True,
        text=True,
        env=subprocess_env,
        check=True,
    )
    for group in dataclasses.fields(Config):
        for leaf in dataclasses.fields(group.default_factory):
            assert f"--{group.name}.{leaf.name}" in result.stdout
