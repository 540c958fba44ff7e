"""What readers yield, what they count, and which of it to keep."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from biomedlm_jax.corpus.files import shown
from biomedlm_jax.errors import UserError
from biomedlm_jax.tokenizer import LONE_SURROGATE

PUBMED_SETS = ("PubMed Abstracts", "PubMed Central")

# Reasons that mean damage; the others are ordinary in sound data.
_Broken = Literal["not JSON", "malformed XML", "wrong type", "no text", "no set name", "invalid UTF-8", "too long"]
BROKEN: tuple[_Broken, ...] = get_args(_Broken)
Reason = Literal[_Broken, "empty", "another set", "another language", "no abstract", "no article", "not XML"]

# What to do where sound data look broken.
_REMEDIES: dict[_Broken, str] = {
    "not JSON": "each line must be one JSON object",
    "no text": "text_field names the key of the text",
    "no set name": "an empty pile_sets keeps records that do not say in meta.pile_set_name which set they are of",
}
# Places kept for each reason.
MAX_SAMPLES = 3


@dataclass(frozen=True)
class Document:
    """A text and where it is from."""

    text: str
    source: str
    """The name of The Pile's set, "PubMed Abstracts" and "PubMed Central" also for NLM's XML; else "json", "parquet",
    "text" or "synthetic"."""
    pmid: int = 0
    """PubMed's number of a record of NLM's XML; 0 elsewhere."""
    version: int = 0
    """Version of that record, from 1; 0 elsewhere."""


@dataclass(frozen=True)
class Selection:
    """Which records to keep, and where their text is."""

    pile_sets: tuple[str, ...] = PUBMED_SETS
    """The Pile's sets, by meta.pile_set_name; none keeps every record, also without that name."""
    text_field: str = "text"
    """Key or column of the text, in JSON lines and Parquet."""
    languages: tuple[str, ...] = ("eng",)
    """Languages of PubMed XML and JATS in NLM's codes; none keeps all."""


@dataclass
class ReadReport:
    """What was read and what was left out, counted while reading."""

    documents: int = 0
    """Documents kept."""
    bytes: int = 0
    """Length of their text in UTF-8."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    replaced_surrogates: int = 0
    """Lone surrogates replaced by U+FFFD in the documents kept."""
    samples: dict[str, list[str]] = field(default_factory=dict)
    """The first places of each reason, as "file:line"; or "file:row 7", or a member of an archive instead of a line."""
    raw_bytes: int = field(default=0, compare=False)
    """Bytes of the files themselves that are used up, before decompression: how far reading is."""
    deleted: list[int] = field(default_factory=list)
    """PMIDs that NLM's update files delete, of records in the same and in earlier files."""

    @property
    def bad_fraction(self) -> float:
        """Broken records / all records; empty records and other sets are not broken."""
        seen = self.documents + self.dropped.total()
        return sum(self.dropped[reason] for reason in BROKEN) / max(seen, 1)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "dropped": dict(self.dropped),
            "replaced_surrogates": self.replaced_surrogates,
            "bad_fraction": self.bad_fraction,
            "samples": {reason: list(places) for reason, places in self.samples.items()},
        }

    def check(self, max_bad_fraction: float) -> None:
        """Refuses text of which too much is broken. Raises: UserError: names the first place."""
        if self.bad_fraction > max_bad_fraction:
            reason = max(BROKEN, key=lambda reason: self.dropped[reason])
            remedy = f" ({_REMEDIES[reason]})" if reason in _REMEDIES else ""
            raise UserError(
                f"{self.bad_fraction:.1%} of the records are broken, more than the {max_bad_fraction:.1%} allowed; "
                f"for instance {reason} at {self.samples[reason][0]}{remedy}"
            )

    def drop(self, reason: Reason, file: str, place: int | str) -> None:
        """Counts a record that is left out; `place` is its line in the file, or what finds it there."""
        self.dropped[reason] += 1
        places = self.samples.setdefault(reason, [])
        if len(places) < MAX_SAMPLES:
            places.append(f"{shown(file)}:{shown(str(place))}")

    def keep(
        self, text: str, source: str, file: str, place: int | str, pmid: int = 0, version: int = 0
    ) -> Document | None:
        """The document, counted; None, counted as well, if it is blank."""
        if not text or text.isspace():
            self.drop("empty", file, place)
            return None
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            text, replaced = LONE_SURROGATE.subn("\ufffd", text)
            self.replaced_surrogates += replaced
            size = len(text.encode())
        self.documents += 1
        self.bytes += size
        return Document(text, source, pmid, version)
