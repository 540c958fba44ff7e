"""Numbers of answers, against scikit-learn-like definitions written out, and values worked by hand."""

import math

import numpy as np
import pytest

from biomedlm_jax import scoring
from biomedlm_jax.errors import UserError

SCORES = np.log([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.05, 0.05, 0.9], [0.5, 0.25, 0.25]])
LABELS = [0, 0, 2, 1]


def test_accuracy_and_log_loss():
    assert scoring.accuracy(SCORES, LABELS) == 0.5
    expected = -np.mean([math.log(0.7), math.log(0.3), math.log(0.9), math.log(0.25)])
    assert scoring.log_loss(SCORES + 100, LABELS) == pytest.approx(expected)
    # The first of equal answers is taken, and absent ones never are.
    assert scoring.accuracy(np.array([[1.0, 1.0], [-np.inf, -5.0]]), [0, 1]) == 1


def test_macro_f1():
    """Classes 0: 1 right of 2 predicted and 2 there; 1: never right; 2: always."""
    predictions, labels = SCORES.argmax(axis=1), np.array(LABELS)
    assert predictions.tolist() == [0, 1, 2, 0]
    assert scoring.macro_f1(predictions, labels) == pytest.approx((0.5 + 0 + 1) / 3)
    # What a classifier that always says the majority gets.
    assert scoring.macro_f1(np.zeros(4, int), np.array([0, 0, 0, 1])) == pytest.approx((6 / 7 + 0) / 2)


def test_calibration():
    confidence, accuracy, share = scoring.calibration(SCORES, LABELS, bins=2)
    # Below one half: 0.4, wrong; from there: 0.7 and 0.9 right, 0.5 wrong.
    np.testing.assert_allclose(confidence, [0.4, 0.7])
    np.testing.assert_allclose(accuracy, [0, 2 / 3])
    np.testing.assert_allclose(share, [0.25, 0.75])
    expected = 0.25 * 0.4 + 0.75 * (0.7 - 2 / 3)
    assert scoring.expected_calibration_error(SCORES, LABELS, bins=2) == pytest.approx(expected)


def test_the_interval_is_that_of_resampled_outcomes():
    correct = np.arange(50) < 31
    rng = np.random.default_rng(1)
    means = [rng.choice(correct, 50).mean() for _ in range(10_000)]
    np.testing.assert_allclose(scoring.bootstrap_interval(correct), np.percentile(means, [2.5, 97.5]), atol=0.021)
    assert scoring.bootstrap_interval(correct) == scoring.bootstrap_interval(correct)
    assert scoring.bootstrap_interval([True] * 5) == (1, 1)


def test_rouge():
    pytest.importorskip("rouge_score")
    found = scoring.rouge([("the cat sat", "the cat sat"), ("a b c d", "a x c y")])
    assert found["rouge1"] == pytest.approx((1 + 0.5) / 2)
    assert found["rouge2"] == pytest.approx((1 + 0) / 2)
    assert found["rougeL"] == pytest.approx((1 + 0.5) / 2)


def test_rouge_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
    with pytest.raises(UserError, match="pip install rouge-score"):
        scoring.import_rouge()
