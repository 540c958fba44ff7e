"""Numbers of answers: accuracy with its interval, macro-F1, calibration, and what guessing the majority would reach."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from biomedlm_jax.errors import UserError

Scores = Float[np.ndarray, "examples answers"]
Labels = Sequence[int] | Int[np.ndarray, "examples"]


def gather(jitted_scores: Any, params: Any, batches: Iterable[Any], count: int) -> Scores:
    """The scores of the first `count` questions of all batches, in order.

    Args:
      jitted_scores: of `heads.jit_scores`.
    """
    return np.concatenate([np.asarray(jitted_scores(params, batch)) for batch in batches])[:count]


def probabilities(scores: Scores) -> Scores:
    """Softmax over the answers, in float64."""
    scores = np.asarray(scores, np.float64)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def log_loss(scores: Scores, labels: Labels) -> float:
    """Mean of -log of the right answers' probabilities, in nats."""
    right = probabilities(scores)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(right, 1e-300)).mean())


def accuracy(scores: Scores, labels: Labels) -> float:
    """Part of the questions whose right answer has the highest score, the first of equal ones."""
    return float((scores.argmax(axis=1) == np.asarray(labels)).mean())


def bootstrap_interval(correct: Sequence[bool], seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of a mean of outcomes, by the percentiles of resampled ones.

    Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13. How many of a resample are right is binomial,
    so that it can be drawn at once.
    """
    count, right = len(correct), int(np.sum(correct))
    means = np.random.default_rng(seed).binomial(count, right / count, resamples) / count
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def macro_f1(predictions: Int[np.ndarray, "examples"], labels: Int[np.ndarray, "examples"]) -> float:
    """The mean of F1 over the classes that are there or were predicted, each as important as any other."""
    values = []
    for label in np.union1d(predictions, labels):
        true = np.sum((predictions == label) & (labels == label))
        values.append(2 * true / (np.sum(predictions == label) + np.sum(labels == label)))
    return float(np.mean(values))


def calibration(
    scores: Scores, labels: Labels, bins: int = 10
) -> tuple[Float[np.ndarray, "bins"], Float[np.ndarray, "bins"], Float[np.ndarray, "bins"]]:
    """Mean confidence, accuracy, and share of the answers, for bins of confidence of equal width that hold some."""
    found = probabilities(scores)
    confidence, correct = found.max(axis=1), found.argmax(axis=1) == np.asarray(labels)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    inside = [which == number for number in np.unique(which)]
    return (
        np.array([confidence[part].mean() for part in inside]),
        np.array([correct[part].mean() for part in inside]),
        np.array([part.mean() for part in inside]),
    )


def expected_calibration_error(scores: Scores, labels: Labels, bins: int = 10) -> float:
    """How far confidence is from accuracy, over bins of equal width; Guo et al. 2017, equation 3."""
    confidence, correct, share = calibration(scores, labels, bins)
    return float(np.sum(np.abs(confidence - correct) * share))


def describe(results: Mapping[str, Any]) -> str:
    """What `results.json` holds, in a line."""
    text = f"{results['task']}: {results['examples']:,} examples answered by {results['answered_by']}"
    if "accuracy" in results:
        low, high = results["accuracy_95"]
        majority = results["majority"]
        text += (
            f": accuracy {results['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}); always "
            f"{majority['answer']}: {majority['accuracy']:.1%}"
        )
        if "macro_f1" in results:
            text += f"; macro-F1 {results['macro_f1']:.3f}"
    if "rouge1" in results:
        text += f": ROUGE-1 {results['rouge1']:.3f}, ROUGE-2 {results['rouge2']:.3f}, ROUGE-L {results['rougeL']:.3f}"
    return text


def import_rouge() -> Any:
    """The scorer of Google's rouge-score. Raises: UserError: it is not installed."""
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError("ROUGE needs a package: pip install rouge-score") from error
    return rouge_scorer


def rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Means of ROUGE-1, -2 and -L's F-measures, with stemming, of (right text, text made)."""
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = import_rouge().RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(target, text) for target, text in pairs]
    return {kind: float(np.mean([one[kind].fmeasure for one in found])) for kind in kinds}
