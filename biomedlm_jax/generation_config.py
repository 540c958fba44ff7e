"""How the next token is chosen: settings of `generation.generate` and of the command `generate`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from biomedlm_jax.errors import UserError


def _setting(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class GenerationConfig:
    """Names and meanings are those of transformers' GenerationConfig; each field says its own in its metadata."""

    max_new_tokens: int = _setting(100, "tokens after the prompt, the end of the text included")
    temperature: float = _setting(
        0.0, "0 takes the likeliest token; above, tokens are drawn, at 1 with the model's own probabilities"
    )
    top_k: int = _setting(0, "draw among so many likeliest tokens; 0 is all")
    top_p: float = _setting(1.0, "draw among the likeliest tokens that hold this share of the probability")
    num_beams: int = _setting(1, "sequences that a beam search keeps; 1 is none")
    length_penalty: float = _setting(
        1.0, "of a beam search: the power of its length by which a sequence's summed log probability is divided"
    )
    repetition_penalty: float = _setting(
        1.0, "divides the logits above 0 of tokens that were there, and multiplies those below"
    )
    no_repeat_ngram_size: int = _setting(
        0, "no so many tokens come twice in this order, the prompt's included; 0 is no limit"
    )
    seed: int = _setting(
        0, "of the draws, which depend on it, on the prompt's place among the prompts, and on nothing else"
    )

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("temperature", 0, None),
            ("top_k", 0, None),
            ("num_beams", 1, None),
            ("no_repeat_ngram_size", 0, None),
            ("top_p", 0, 1),
            ("repetition_penalty", 0, None),
            ("length_penalty", -math.inf, None),
        ):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, not {value}")
            if not value >= low or (high is not None and value > high):
                between = f"at least {low}" if high is None else f"in [{low}, {high}]"
                raise UserError(f"{name} must be {between}, not {value}")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise UserError(f"{name} must be above 0")
        if self.num_beams > 1 and self.temperature:
            raise UserError("num_beams and temperature exclude each other: a beam search draws nothing")
