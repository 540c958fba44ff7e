"""Several sets read as one: exact shares, each set's epochs, what must fit, and a run on two of them."""

import json
import shutil
import sys

import numpy as np
import pytest
import tiny

from biomedlm_jax import checkpoint, metrics, mixture, preparation, prepare, rows
from biomedlm_jax import config as config_lib
from biomedlm_jax import train as train_lib
from biomedlm_jax.config import DataConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.rows import Rows


def make_set(count, fingerprint):
    return Rows([{"tokens": np.zeros(4, np.uint16)}] * count, 4, count * 4, fingerprint, 0)


def make(counts, weights):
    return mixture.make_mixture(
        [(make_set(count, str(i)), weight) for i, (count, weight) in enumerate(zip(counts, weights, strict=True))]
    )


@pytest.mark.parametrize(
    ("counts", "weights"),
    [
        ((100, 100), (1, 1)),
        ((410, 70, 130), (0.5, 0.2, 0.3)),
        ((3, 500), (1e-3, 1)),
        ((50, 70, 30, 60, 80), (3, 1, 4, 1, 5)),
    ],
)
def test_shares_are_exact_and_each_set_has_its_own_epochs(counts, weights):
    draws = make(counts, weights).draws(0)
    in_order = [draws[number] for number in range(2000)]
    drawn = [[] for _ in counts]
    for number, (of_set, row) in enumerate(in_order):
        drawn[of_set].append(row)
        for i, weight in enumerate(weights):
            assert abs(len(drawn[i]) - (number + 1) * weight / sum(weights)) < len(counts)
    for count, taken in zip(counts, drawn, strict=True):
        epochs = [taken[start : start + count] for start in range(0, len(taken) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) == len(epochs) and (len(epochs) > 1 or count == 3)
    # Any draw at once, in any order.
    for number in np.random.default_rng(0).integers(0, 2000, 100).tolist():
        assert make(counts, weights).draws(0)[number] == in_order[number]


def test_weights_that_are_almost_equal_are_kept_apart():
    """Grain's own mixture makes 1 : 1.009 the same as 1 : 1."""
    interleaved = mixture._Interleaved((1 / 2.009, 1.009 / 2.009))
    # Draw 200,900,000 comes after exactly so many of each.
    of_set, before = interleaved[200_900_000]
    assert abs(before - (100_000_000 if of_set == 0 else 100_900_000)) <= 2


def test_sets_of_one_length_are_permuted_differently():
    draws = make((64, 64), (1, 1)).draws(0)
    first, second = ([draws[n][1] for n in range(256) if draws[n][0] == i] for i in (0, 1))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 16


def test_the_order_of_folders_changes_nothing():
    pairs = [(make_set(30, "b"), 1.0), (make_set(20, "a"), 3.0), (make_set(10, "c"), 2.0)]
    one, other = mixture.make_mixture(pairs), mixture.make_mixture(pairs[::-1])
    assert one.identity() == other.identity()
    assert [one.draws(1)[n] for n in range(500)] == [other.draws(1)[n] for n in range(500)]
    assert [one.draws(1)[n] for n in range(500)] != [one.draws(2)[n] for n in range(500)]
    assert one.weights == pytest.approx((1 / 2, 1 / 6, 1 / 3))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_are_numbers_above_0(weight):
    with pytest.raises(UserError, match=r"data.mixture: the weight of b must be a number above 0, not"):
        DataConfig(mixture={"a": 1.0, "b": weight})


def test_mistakes_on_the_command_line():
    for text, message in [
        ("{a: .nan}", "the weight of a must be a number above 0, not nan"),
        ("{'': 1}", "a folder without a name"),
        ("{a: many}", "many"),
        ("[a, b]", "mixture"),
    ]:
        with pytest.raises(UserError, match=message):
            config_lib.parse_args("train", "", ["--data.mixture", text])
    config = config_lib.parse_args("train", "", ["--data.mixture", "{a/b: 1, c: 0.5}", "--data.source", "pile"])
    assert config.data.mixture == {"a/b": 1.0, "c": 0.5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sets of one tokenizer, one half as large as the other and without anything in common."""
    folder = tmp_path_factory.mktemp("data")
    preparation.ensure_prepared(tiny.run_config(folder / "large", ""))
    changes = {"synthetic_documents": 100, "synthetic_eval_documents": 5, "tokenizer": str(folder / "large/tokenizer")}
    preparation.ensure_prepared(tiny.run_config(folder / "small", "", data=changes | {"dir": str(folder / "small")}))
    return folder


def run_config(folders, run_dir, weights=(1.0, 3.0), **groups):
    data = {"dir": "", "mixture": {str(folders / "large"): weights[0], str(folders / "small"): weights[1]}}
    config = tiny.run_config("", run_dir, data=data, train={"steps": 4, "eval_every": 4, "checkpoint_every": 2})
    return tiny.replace(config, **groups)


def test_a_run_on_a_mixture(folders, tmp_path, caplog, capsys):
    config = run_config(folders, tmp_path / "run")
    with caplog.at_level("INFO", logger="biomedlm_jax"):
        assert train_lib.train(config) == 0
    small = rows.read_manifest(folders / "small")["splits"]
    epochs = 4 * 16 * 0.75 / small["train"]["rows"]
    assert f"75.00% of each batch from the {small['train']['rows']} rows of {folders / 'small'}" in caplog.text
    assert f"{epochs:.2f} epochs in this run" in caplog.text
    assert "is chance that no model can learn" in capsys.readouterr().out
    last = [line for line in metrics.read_metrics(config.run.dir) if "eval/loss" in line][-1]
    tokens = {
        name: counts["tokens"] - counts["rows"]
        for name in ("large", "small")
        for counts in [rows.read_manifest(folders / name)["splits"]["eval"]]
    }
    expected = sum(last[f"eval/loss/{name}"] * count for name, count in tokens.items()) / sum(tokens.values())
    assert last["eval/loss"] == pytest.approx(expected, rel=1e-6)
    assert last["eval/loss/large"] != last["eval/loss/small"]
    # It goes on with the same sets and weights only, whatever the names of the folders.
    shutil.rmtree(checkpoint.checkpoint_folder(config.run.dir) / "4")
    assert train_lib.train(config) == 0
    for weights, message in [((1, 2), "weights was .*, is "), ((2, 6), "")]:
        shutil.rmtree(checkpoint.checkpoint_folder(config.run.dir) / "4", ignore_errors=True)
        other = run_config(folders, tmp_path / "run", weights)
        if message:
            with pytest.raises(UserError, match=f"the rows are not those that .* was trained on: {message}"):
                train_lib.train(other)
        else:
            assert train_lib.train(other) == 0


def test_a_mixture_of_one_is_the_folder(folders, tmp_path):
    config = tiny.run_config(folders / "large", tmp_path / "run", train={"steps": 4, "checkpoint_every": 2})
    assert train_lib.train(config) == 0
    shutil.rmtree(checkpoint.checkpoint_folder(config.run.dir) / "4")
    before = metrics.read_metrics(config.run.dir)[-1]
    assert train_lib.train(tiny.replace(config, data={"mixture": {str(folders / "large"): 0.5}})) == 0
    assert metrics.read_metrics(config.run.dir)[-1]["eval/loss"] == before["eval/loss"]


def test_prepare_says_what_there_is(folders, monkeypatch, capsys):
    options = [
        f"--data.mixture={{{folders / 'large'}: 1, {folders / 'small'}: 1}}",
        "--model.vocab_size=600",
        "--model.n_positions=64",
    ]
    monkeypatch.setattr(sys, "argv", ["prepare", *options])
    prepare.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(folders / "large"), str(folders / "small")]


def test_what_does_not_fit_is_named(folders, tmp_path):
    large, small = folders / "large", folders / "small"

    def check(**groups):
        mixture.check_folders(run_config(folders, "", **groups))

    check()
    with pytest.raises(UserError, match=f"{large} was prepared with model.n_positions 64, .* has 32"):
        check(model={"n_positions": 32})
    with pytest.raises(UserError, match=f"{tmp_path / 'nowhere'} holds no prepared rows"):
        check(data={"mixture": {str(large): 1.0, str(tmp_path / "nowhere"): 1.0}})
    other = tmp_path / "other"
    shutil.copytree(small, other)
    both = {"data": {"mixture": {str(large): 1.0, str(other): 1.0}}}
    manifest = json.loads((other / "manifest.json").read_text())
    for name, value in [("n_positions", 32), ("vocab_size", 601), ("tokenizer_sha256", "abc")]:
        (other / "manifest.json").write_text(json.dumps(manifest | {name: value}))
        with pytest.raises(UserError, match=f"{large} has {name} {manifest[name]}, and {other} has {value}"):
            check(**both)
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"({small} and {other}|{other} and {small}) hold the same rows"):
        mixture.open_train(
            run_config(folders, "", data={"mixture": {str(folder): 1.0 for folder in (large, small, other)}})
        )
    # A tokenizer that does not belong to the rows, beside them or given.
    foreign = tmp_path / "foreign"
    preparation.ensure_prepared(tiny.run_config(foreign, "", data={"synthetic_documents": 50}))
    shutil.rmtree(other / "tokenizer")
    shutil.copytree(foreign / "tokenizer", other / "tokenizer")
    with pytest.raises(UserError, match=f"the tokenizer {other / 'tokenizer'} .* is not the one .* of {other} were"):
        check(**both)
    with pytest.raises(UserError, match=f"the tokenizer {foreign / 'tokenizer'} .* is not the one .* of {large} were"):
        check(data={"tokenizer": str(foreign / "tokenizer")})


def test_names_of_held_out_sets_are_unique(folders, tmp_path):
    other = tmp_path / "small"
    shutil.copytree(folders / "small", other)
    names = {str(folder): 1.0 for folder in (folders / "large", folders / "small", other)}
    found = mixture.open_held_out(run_config(folders, "", data={"mixture": names}))
    assert list(found) == ["large", str(folders / "small"), str(other)]
