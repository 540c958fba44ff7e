"""Text from prompts: greedy, sampled, or by beam search, as transformers' `generate` does them.

One compiled step picks the next token of every row and reads it. The host only starts steps, and looks some steps later
whether all rows have ended, so that the device never waits for it.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm import tqdm

from biomedlm_jax import decoding
from biomedlm_jax.config import ModelConfig
from biomedlm_jax.decoding import Cache, Weights
from biomedlm_jax.errors import UserError
from biomedlm_jax.generation_config import GenerationConfig
from biomedlm_jax.tokenizer import Tokenizer

# Steps that are started before it is known whether they are needed.
_STEPS_AHEAD = 4
# What transformers takes for a score that cannot win; the numbers of a search must be its own.
_NEVER = -1e9


class Rows(NamedTuple):
    """Token ids so far, a row each."""

    tokens: Int[Array, "rows length"]
    """Prompt and what was made; what is behind `lengths` means nothing."""
    lengths: Int[Array, "rows"]


def process(config: GenerationConfig, scores: Float[Array, "rows vocab"], rows: Rows) -> Float[Array, "rows vocab"]:
    """Scores, logits or log probabilities, with the limits on repetition."""
    tokens, lengths = rows
    length = tokens.shape[1]

    def mark(ids: Array, where: Array) -> Array:
        """The vocabulary of each row, true for those of its ids that `where` chooses."""
        return jnp.zeros(scores.shape, bool).at[jnp.arange(len(ids))[:, None], ids].max(where)

    if config.repetition_penalty != 1:
        seen = mark(tokens, jnp.arange(length) < lengths[:, None])
        penalty = config.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if size := config.no_repeat_ngram_size:
        # Where the tokens that a row ends with came before, the one behind them must not come again.
        repeated = jnp.arange(length) + size <= lengths[:, None]
        for offset in range(size - 1):
            last = jnp.take_along_axis(tokens, lengths[:, None] - (size - 1) + offset, axis=1)
            repeated &= jnp.roll(tokens, -offset, axis=1) == last
        banned = mark(jnp.roll(tokens, -(size - 1), axis=1), repeated)
        scores = jnp.where(banned, -jnp.inf, scores)
    return scores


def warp(config: GenerationConfig, scores: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
    """Scores to draw from, in transformers' order: by the temperature, and -inf for all but the likeliest tokens."""
    scores = scores / config.temperature
    if 0 < config.top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, config.top_k)[0][:, -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if config.top_p < 1:
        ascending = jnp.sort(scores, axis=-1)
        too_unlikely = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - config.top_p
        # The likeliest one stays whatever its share.
        too_unlikely = too_unlikely.at[:, -1].set(False)
        least = jnp.min(jnp.where(too_unlikely, jnp.inf, ascending), axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores


def _choose(
    config: GenerationConfig, scores: Float[Array, "rows vocab"], keys: Key[Array, "rows"]
) -> Int[Array, "rows"]:
    """A token for each row: the likeliest, or one drawn."""
    if not config.temperature:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, warp(config, scores)).astype(jnp.int32)


class _Progress(NamedTuple):
    """What a step of `_advance` takes and gives besides the cache."""

    rows: Rows
    logits: Float[Array, "rows vocab"]
    ended: Bool[Array, "rows"]


@functools.partial(jax.jit, static_argnames=("model", "config", "eos_id"), donate_argnames="cache")
def _advance(
    model: ModelConfig,
    config: GenerationConfig,
    eos_id: int,
    weights: Weights,
    cache: Cache,
    progress: _Progress,
    ids: Int[Array, "rows"],
) -> tuple[_Progress, Cache, Int[Array, "rows"], Bool[Array, ""]]:
    """The next token of each row, and the logits of the one behind it; those of rows that have ended are `eos_id`.

    Also those tokens, and whether all rows have ended.
    """
    (tokens, lengths), logits, ended = progress
    keys = jax.vmap(jax.random.fold_in)(
        jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), ids), lengths
    )
    new = jnp.where(ended, eos_id, _choose(config, process(config, logits, progress.rows), keys))
    index = jnp.arange(len(new))
    tokens = tokens.at[index, lengths].set(new, mode="drop")
    ended = ended | (new == eos_id)
    logits, cache = decoding.decode(model, weights, cache, new, jnp.minimum(lengths, tokens.shape[1] - 1))
    return _Progress(Rows(tokens, lengths + ~ended), logits, ended), cache, new, ended.all()


class _Search(NamedTuple):
    """What a step of `_advance_search` takes and gives besides the cache: `beams` sequences of each prompt."""

    tokens: Int[Array, "prompts beams length"]
    lengths: Int[Array, "prompts"]
    """Of all running sequences of a prompt."""
    scores: Float[Array, "prompts beams"]
    """Summed log probabilities, the highest first."""
    logits: Float[Array, "prompts*beams vocab"]
    finished: Int[Array, "prompts beams length"]
    """The best sequences that have ended, or had no more room."""
    finished_lengths: Int[Array, "prompts beams"]
    finished_scores: Float[Array, "prompts beams"]
    """Summed log probabilities / length ** length_penalty, the highest first."""
    is_finished: Bool[Array, "prompts beams"]
    open: Bool[Array, "prompts"]
    """Whether a running sequence may yet be better than the worst finished one."""


@functools.partial(jax.jit, static_argnames=("model", "config", "eos_id"), donate_argnames="cache")
def _advance_search(
    model: ModelConfig,
    config: GenerationConfig,
    eos_id: int,
    weights: Weights,
    cache: Cache,
    search: _Search,
    prompt_lengths: Int[Array, "prompts"],
) -> tuple[_Search, Cache, Bool[Array, ""]]:
    """One step of transformers' `_beam_search`, with early_stopping=False, and whether the search is over."""
    prompts, beams, length = search.tokens.shape
    flat = Rows(search.tokens.reshape(-1, length), jnp.repeat(search.lengths, beams))
    log_probs = process(config, jax.nn.log_softmax(search.logits, axis=-1), flat)
    totals = log_probs.reshape(prompts, beams, -1) + search.scores[:, :, None]
    vocab = totals.shape[-1]

    # Twice as many candidates as beams: even if the best ones all end here, enough go on.
    scores, chosen = jax.lax.top_k(totals.reshape(prompts, -1), 2 * beams)
    parents, new = chosen // vocab, (chosen % vocab).astype(jnp.int32)
    tokens = jnp.take_along_axis(search.tokens, parents[:, :, None], axis=1)
    tokens = jnp.where(jnp.arange(length) == search.lengths[:, None, None], new[:, :, None], tokens)
    lengths = search.lengths + 1
    made = (lengths - prompt_lengths)[:, None]
    ends = (new == eos_id) | (made >= config.max_new_tokens)

    # ---- Those that go on
    running_scores, kept = jax.lax.top_k(scores + ends * _NEVER, beams)
    running_tokens = jnp.take_along_axis(tokens, kept[:, :, None], axis=1)
    sources = jnp.take_along_axis(parents, kept, axis=1) + beams * jnp.arange(prompts)[:, None]

    # ---- Those that end, if they are among the best and better than what ended before
    ends_well = ends & (jnp.arange(2 * beams) < beams)
    ended_scores = scores / made**config.length_penalty + _NEVER * ~search.open[:, None] + _NEVER * ~ends_well
    merged_scores = jnp.concatenate([search.finished_scores, ended_scores], axis=1)
    finished_scores, best = jax.lax.top_k(merged_scores, beams)
    finished = jnp.take_along_axis(jnp.concatenate([search.finished, tokens], axis=1), best[:, :, None], axis=1)
    all_lengths = jnp.concatenate([search.finished_lengths, jnp.broadcast_to(lengths[:, None], new.shape)], axis=1)
    is_finished = jnp.take_along_axis(jnp.concatenate([search.is_finished, ends_well], axis=1), best, axis=1)
    worst = jnp.where(is_finished, finished_scores.min(axis=1, keepdims=True), _NEVER)
    best_possible = running_scores[:, :1] / made**config.length_penalty
    is_open = search.open & (best_possible > worst).any(axis=1) & (made[:, 0] < config.max_new_tokens)

    cache = jax.tree.map(lambda x: x[sources.reshape(-1)], cache)
    read = jnp.take_along_axis(running_tokens, search.lengths[:, None, None], axis=2).reshape(-1)
    positions = jnp.repeat(jnp.minimum(search.lengths, length - 1), beams)
    logits, cache = decoding.decode(model, weights, cache, read, positions)
    return (
        _Search(
            running_tokens,
            lengths,
            running_scores,
            logits,
            finished,
            jnp.take_along_axis(all_lengths, best, axis=1),
            finished_scores,
            is_finished,
            is_open,
        ),
        cache,
        ~is_open.any(),
    )


@dataclass(frozen=True)
class Generated:
    """What was made of a prompt.

    Attributes:
      tokens: ids without the prompt's and the end of the text.
      ended: whether the text ended, and not the room for it.
    """

    tokens: list[int]
    ended: bool


def check_prompts(
    model: ModelConfig, config: GenerationConfig, prompts: Sequence[Sequence[int]], names: Sequence[str] = ()
) -> None:
    """Refuses prompts that cannot be continued.

    Args:
      names: what messages call them; by default their numbers.

    Raises:
      UserError: one is empty, or with `max_new_tokens` longer than the model reads.
    """
    for number, prompt in enumerate(prompts):
        name = names[number] if names else f"prompt {number + 1}"
        if not prompt:
            raise UserError(f"{name} is empty")
        if len(prompt) + config.max_new_tokens > model.n_positions:
            raise UserError(
                f"{name} has {len(prompt)} tokens, and with max_new_tokens {config.max_new_tokens} is longer "
                f"than the {model.n_positions} that the model reads: shorten the prompt or lower max_new_tokens"
            )


def _repeat(step: Callable[[], Array], count: int) -> None:
    """Starts up to `count` steps, until one some steps back says that it was the last needed."""
    waiting: deque[Array] = deque()
    for _ in range(count):
        waiting.append(step())
        if len(waiting) > _STEPS_AHEAD and waiting.popleft():
            break


def generate(
    model: ModelConfig,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    eos_id: int,
    first_id: int = 0,
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> list[Generated]:
    """Continues a batch of prompts, each until the end of the text or `max_new_tokens`.

    Args:
      prompts: token ids, of any lengths.
      first_id: number of the first prompt among all, by which draws are seeded.
      on_tokens: is told the next token of each row as it is there, `eos_id` for those that have ended; the device then
        waits for it. Not of a beam search, which knows its tokens at its end only.

    Raises:
      UserError: see `check_prompts`.
    """
    check_prompts(model, config, prompts)
    prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # Rounded up, so that few programs are compiled.
    seq = min(model.n_positions, -(-int(prompt_lengths.max()) // 32) * 32)
    length = min(model.n_positions, -(-(int(prompt_lengths.max()) + config.max_new_tokens) // 64) * 64)
    tokens = np.full((len(prompts), length), eos_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits, cache = decoding.prefill(model, weights, tokens[:, :seq], prompt_lengths, length)
    if config.num_beams > 1:
        return _beam_search(model, weights, config, eos_id, tokens, prompt_lengths, logits, cache)

    progress = _Progress(Rows(jnp.asarray(tokens), jnp.asarray(prompt_lengths)), logits, jnp.zeros(len(prompts), bool))
    ids = first_id + jnp.arange(len(prompts))

    def step() -> Array:
        nonlocal progress, cache
        progress, cache, new, done = _advance(model, config, eos_id, weights, cache, progress, ids)
        if on_tokens:
            on_tokens(np.asarray(new))
        return done

    _repeat(step, config.max_new_tokens)
    made, lengths, ended = jax.device_get((*progress.rows, progress.ended))
    return [
        Generated(row[start:end].tolist(), bool(has_ended))
        for row, start, end, has_ended in zip(made, prompt_lengths, lengths, ended, strict=True)
    ]


def generate_all(
    model: ModelConfig,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    eos_id: int,
    batch_size: int,
) -> Iterator[Generated]:
    """Continues any number of prompts, so many at once, in their order."""
    with tqdm(total=len(prompts), desc="generating", unit=" prompts", disable=None) as progress:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            yield from generate(model, weights, batch, config, eos_id, first_id=start)
            progress.update(len(batch))


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of what was made; words that fine-tuning added to a model are none of its tokenizer's."""
    return tokenizer.decode([token for token in ids if token < tokenizer.vocab_size])


def _beam_search(
    model: ModelConfig,
    weights: Weights,
    config: GenerationConfig,
    eos_id: int,
    tokens: np.ndarray,
    prompt_lengths: np.ndarray,
    logits: Array,
    cache: Cache,
) -> list[Generated]:
    prompts, beams = len(tokens), config.num_beams
    cache = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), cache)
    start = jnp.asarray(np.repeat(tokens[:, None], beams, axis=1))
    lengths = jnp.asarray(prompt_lengths)
    never = jnp.full((prompts, beams), _NEVER)
    search = _Search(
        start,
        lengths,
        never.at[:, 0].set(0),  # all sequences are the same at first
        jnp.repeat(logits, beams, axis=0),
        start,
        jnp.repeat(lengths[:, None], beams, axis=1),
        never,
        jnp.zeros((prompts, beams), bool),
        jnp.ones(prompts, bool),
    )

    def step() -> Array:
        nonlocal search, cache
        search, cache, done = _advance_search(model, config, eos_id, weights, cache, search, lengths)
        return done

    _repeat(step, config.max_new_tokens)
    made, ends = jax.device_get((search.finished[:, 0], search.finished_lengths[:, 0]))
    results = []
    for row, begin, end in zip(made, prompt_lengths, ends, strict=True):
        new = row[begin:end].tolist()
        ended = bool(new) and new[-1] == eos_id
        results.append(Generated(new[:-1] if ended else new, ended))
    return results
