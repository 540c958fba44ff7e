"""Answers of a language model that was never fine-tuned: how likely it finds each choice behind the question.

Prompts and log-likelihoods are those of EleutherAI's lm-evaluation-harness
(https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/tasks and lm_eval/api/model.py), so that its numbers and
these can be compared.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from biomedlm_jax import model as model_lib
from biomedlm_jax import sharding, step
from biomedlm_jax.config import Config
from biomedlm_jax.encoding import padded_length
from biomedlm_jax.loss import head_logits
from biomedlm_jax.model import Params
from biomedlm_jax.tasks import LETTERS, TASKS, Classification, Example, MultipleChoice
from biomedlm_jax.tokenizer import Tokenizer

Choices = Literal["texts", "letters"]
_TARGET_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is before an answer, and all answers, which follow behind a space."""

    context: str
    answers: tuple[str, ...]


def make_prompt(task: str, example: Example, choices: Choices) -> Prompt:
    """The prompt of a question.

    Args:
      task: its name.
      choices: of multiple choice, whether the choices' own texts are the answers, which are not shown before, as
        lm-evaluation-harness does for ARC; or letters, for choices that are shown, as it does for these tasks, but for
        the first line of its MMLU, which names the subject.
    """
    if isinstance(example, Classification):
        context = "\n".join(example.contexts)
        return Prompt(f"Abstract: {context}\nQuestion: {example.question}\nAnswer:", TASKS[task].labels)
    assert isinstance(example, MultipleChoice)
    if choices == "texts":
        return Prompt(f"Question: {example.question}\nAnswer:", example.choices)
    letters = tuple(LETTERS[: len(example.choices)])
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, example.choices, strict=True))
    begin, between = {"medqa": ("Question: ", ""), "medmcqa": ("Question: ", "Choices:\n"), "mmlu": ("", "")}[task]
    return Prompt(f"{begin}{example.question}\n{between}{listed}Answer:", letters)


def with_shots(prompt: Prompt, shots: Sequence[tuple[Prompt, int]]) -> Prompt:
    """The prompt behind others with their right answers, a blank line between them."""
    before = "".join(f"{shot.context} {shot.answers[label]}\n\n" for shot, label in shots)
    return dataclasses.replace(prompt, context=before + prompt.context)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Continuations:
    """Rows of tokens, of which the last ones are to be predicted.

    Attributes:
      tokens: without the last one, padded on the right.
      first: the position that predicts the first target.
      targets: padded on the right.
      counts: of targets that are no padding.
    """

    tokens: Int[Array, "batch seq"]
    first: Int[Array, "batch"]
    targets: Int[Array, "batch target"]
    counts: Int[Array, "batch"]


def jit_log_likelihoods(config: Config, mesh: Mesh) -> Any:
    """From parameters and `Continuations` to the log-likelihood of each row's targets, in nats, [batch]."""

    def of_batch(params: Params, batch: Continuations, gather: step.Gather) -> Float[Array, "batch"]:
        hidden = model_lib.merge(config.model, params).hidden_states(batch.tokens, gather=gather)
        # Logits exist for the positions that predict a target only.
        numbers = jnp.arange(batch.targets.shape[1])
        positions = jnp.minimum(batch.first[:, None] + numbers, batch.tokens.shape[1] - 1)
        chosen = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
        logits = head_logits(chosen, params["wte"]["embedding"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return -jnp.sum(losses * (numbers < batch.counts[:, None]), axis=1)

    return step.jit_rows(config, mesh, of_batch)


class Scorer:
    """Log-likelihoods of answers behind contexts, by a model that lies on a mesh.

    Attributes:
      cut: how many contexts were too long, and lost their beginning.
    """

    def __init__(self, config: Config, mesh: Mesh, params: Params, tokenizer: Tokenizer, batch_size: int):
        """Args: `batch_size`, rows at once over all devices."""
        self._config, self._params, self._tokenizer = config, params, tokenizer
        self._batch_size, self._rows = batch_size, sharding.batch_sharding(mesh)
        self._step = jit_log_likelihoods(config, mesh)
        self.cut = 0

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The sums of log-probabilities, in nats, of all tokens of each answer behind its context."""
        encoded = self._encode(pairs)
        self.cut += sum(len(tokens) > self._config.model.n_positions + 1 for tokens, _ in encoded)
        # The longest first: what does not fit into memory does not fit at once.
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index][0]))
        found = np.zeros(len(encoded))
        batches = range(0, len(order), self._batch_size)
        for start in tqdm(batches, desc="answers", unit=" batches", disable=None):
            indices = order[start : start + self._batch_size]
            sums = self._step(self._params, self._batch([encoded[index] for index in indices]))
            found[indices] = np.asarray(sums)[: len(indices)]
        return found.tolist()

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """All tokens, and how many of the last ones are the answer's; without a context the end of text is before."""
        whole = self._tokenizer.encode_batch([context + answer for context, answer in pairs])
        contexts = self._tokenizer.encode_batch([context for context, _ in pairs])
        return [
            ([*([] if context else [self._tokenizer.eos_id]), *ids], len(ids) - len(context))
            for ids, context in zip(whole, contexts, strict=True)
        ]

    def _batch(self, encoded: Sequence[tuple[list[int], int]]) -> Continuations:
        most = self._config.model.n_positions
        longest = min(most, max(len(tokens) - 1 for tokens, _ in encoded))
        seq = padded_length(longest, most)
        width = -(-max(count for _, count in encoded) // _TARGET_MULTIPLE) * _TARGET_MULTIPLE
        rows = np.zeros((self._batch_size, seq), np.int32)
        targets = np.zeros((self._batch_size, width), np.int32)
        first, counts = np.zeros((2, self._batch_size), np.int32)
        for row, (tokens, count) in enumerate(encoded):
            kept = tokens[-(most + 1) :]
            count = min(count, len(kept) - 1)
            rows[row, : len(kept) - 1] = kept[:-1]
            targets[row, :count] = kept[len(kept) - count :]
            first[row], counts[row] = len(kept) - 1 - count, count
        return Continuations(*(sharding.put(array, self._rows) for array in (rows, first, targets, counts)))


# How log-likelihoods of answers become scores: (sums, sums without a context, answers) -> scores.
RULES: dict[str, Callable[[np.ndarray, np.ndarray, Sequence[str]], np.ndarray]] = {
    "sum": lambda sums, alone, answers: sums,
    "length": lambda sums, alone, answers: sums / np.array([len(answer) for answer in answers]),
    "prior": lambda sums, alone, answers: sums - alone,
}


def scores(scorer: Scorer, prompts: Sequence[Prompt]) -> dict[str, list[np.ndarray]]:
    """The scores of each prompt's answers by each of `RULES`.

    'sum', 'length' (by character) and 'prior' are what lm-evaluation-harness takes for acc, acc_norm and
    acc_mutual_info.
    """
    pairs = [(prompt.context, f" {answer}") for prompt in prompts for answer in prompt.answers]
    alone = list(dict.fromkeys(answer for _, answer in pairs))
    found = iter(scorer(pairs))
    prior = dict(zip(alone, scorer([("", answer) for answer in alone]), strict=True))
    by_rule: dict[str, list[np.ndarray]] = {rule: [] for rule in RULES}
    for prompt in prompts:
        sums = np.array([next(found) for _ in prompt.answers])
        without = np.array([prior[f" {answer}"] for answer in prompt.answers])
        for rule, function in RULES.items():
            by_rule[rule].append(function(sums, without, prompt.answers))
    return by_rule
