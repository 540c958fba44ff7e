"""Examples of downstream tasks that tests share: real ones where they lie beside the checkout, else made up."""

from conftest import SHARED

from biomedlm_jax.tasks import TASKS, Classification, Generation, MultipleChoice

REAL = SHARED / "data" / "qa"

_WORDS = ["the", "patient", "received", "aspirin", "and", "a", "tumour", "was", "resected", "after", "chemotherapy"]


def _text(start: int, count: int) -> str:
    return " ".join(_WORDS[(start * 5 + i * (start % 4 + 1)) % len(_WORDS)] for i in range(count)).capitalize()


def multiple_choice(count: int) -> list[MultipleChoice]:
    """Real MedMCQA, or questions about nothing, of mixed lengths."""
    if REAL.is_dir():
        real = TASKS["medmcqa"].read([str(REAL / "medmcqa" / "dev_first2000.json")])
        return sorted(real, key=lambda example: len(example.question))[:: len(real) // count][:count]
    return [
        MultipleChoice(str(i), f"{_text(i, 5 + 7 * i % 40)}?", tuple(_text(i + j, 1 + j) for j in range(4)), i % 4)
        for i in range(count)
    ]


def classification(count: int) -> list[Classification]:
    """Real PubMedQA, or texts and questions about nothing."""
    if REAL.is_dir():
        return TASKS["pubmedqa"].read([str(REAL / "pubmedqa" / "train.jsonl")])[:count]
    return [Classification(str(i), (_text(i, 9 + 5 * i % 50),), f"{_text(i + 1, 6)}?", i % 3) for i in range(count)]


def generation(count: int) -> list[Generation]:
    """Contexts and questions of the above as sources and targets."""
    return [
        Generation(example.id, example.contexts[0][: 15 * (i + 1)], example.question[: 8 * (i + 1)])
        for i, example in enumerate(classification(count))
    ]
