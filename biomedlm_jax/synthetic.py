"""The bundled corpus: a generator of texts that read like PubMed abstracts, about a world that does not exist.

Drugs, genes, diseases, and pathways are invented, and likeness to a real name is an accident; nothing in the texts is
medical knowledge. The facts among them (`knowledge_base`) are the same for every seed, so that a model can learn them
from some documents and be asked about them in others. A held-out set is another range of indices.

Document i of seed s is a function of (s, i) alone. It is made of independent uniform draws, so its probability is one
over the product of the numbers of options; `entropy` is the logarithm of that product, in nats. A text tells all of its
draws (the tests parse texts back into draws), so this is minus the log-probability of the text itself. If two series of
draws could spell one text, it would be too high, and what follows would not hold:

- over many new documents, the sum of `entropy` / the sum of tokens (with one end-of-text each) is the loss of a model
  that knows the generator perfectly, facts and arithmetic included, and no model has a lower expected loss;
- it is a floor, not a forecast; on few documents, or on documents seen in training, a loss can be below it;
- it is for documents predicted from their start: rows that cut documents raise the true floor a little.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from biomedlm_jax.corpus import Document

T = TypeVar("T")
# The slots of a document's sentences, title first, and the values that fill them.
Filling = tuple[list[str], dict[str, Any]]


class Draw:
    """Uniform choices from a seed, and how many equally likely series of choices there were."""

    def __init__(self, seed: str) -> None:
        # Of the generator's methods, random() alone is promised to be the same in every version of Python.
        self._random = random.Random(seed).random
        self.outcomes = 1

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, each as likely as any other."""
        self.outcomes *= len(options)
        return options[int(self._random() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All options in a random order; not counted in `outcomes`."""
        return sorted(options, key=lambda _: self._random())


# --- The world ---------------------------------------------------------------------------------------------------


class Disease(NamedTuple):
    """A disease and what its trials measure."""

    name: str
    outcome: str
    """What its trials count."""
    desirable: bool
    """Whether the outcome is one that patients wish for."""


class Gene(NamedTuple):
    """A gene, and what is true of it wherever it occurs."""

    symbol: str
    pathway: str
    tissue: str
    """Where it is expressed most."""
    disease: Disease
    """What its variants and its product cause."""


class Drug(NamedTuple):
    """A drug, and what is true of it wherever it occurs."""

    name: str
    action: str
    """What it is to its target: "an inhibitor of", ...; the ending of its name tells."""
    target: Gene
    adverse_event: str

    @property
    def indication(self) -> Disease:
        """The one disease it helps in, which is its target's."""
        return self.target.disease


class KnowledgeBase(NamedTuple):
    """All facts of the made-up world."""

    drugs: tuple[Drug, ...]
    genes: tuple[Gene, ...]
    diseases: tuple[Disease, ...]


N_DRUGS, N_GENES, N_DISEASES, N_PATHWAYS = 360, 240, 150, 24

ACTIONS = {
    "tinib": "an inhibitor of",
    "stat": "an inhibitor of",
    "terol": "an agonist of",
    "glutide": "an agonist of",
    "sartan": "an antagonist of",
    "setron": "an antagonist of",
    "limab": "a neutralizing antibody against",
}
RAISING = "an agonist of"
OUTCOMES = (
    ("complete remission", True),
    ("clinical response", True),
    ("functional recovery", True),
    ("sustained symptom relief", True),
    ("mucosal healing", True),
    ("relapse", False),
    ("organ failure", False),
    ("disease progression", False),
    ("treatment failure", False),
    ("hospital readmission", False),
)
ADVERSE_EVENTS = (
    "headache",
    "nausea",
    "fatigue",
    "dizziness",
    "insomnia",
    "pruritus",
    "diarrhea",
    "cough",
    "fever",
    "anemia",
    "neutropenia",
    "rash",
    "hypotension",
    "hypertension",
    "bradycardia",
    "tachycardia",
    "hyperkalemia",
    "hyponatremia",
    "constipation",
    "vomiting",
    "tremor",
    "alopecia",
    "dyspnea",
    "photosensitivity",
)
TISSUES = (
    "liver",
    "kidney",
    "spleen",
    "heart",
    "lung",
    "skin",
    "brain",
    "pancreas",
    "thyroid",
    "ovary",
    "testis",
    "retina",
    "placenta",
    "thymus",
    "colon",
    "stomach",
)


def _names(draw: Draw, count: int, *morphemes: str) -> list[str]:
    """`count` different names, each of one morpheme from every list."""
    return draw.shuffled(["".join(parts) for parts in itertools.product(*(list.split() for list in morphemes))])[:count]


@functools.cache
def knowledge_base() -> KnowledgeBase:
    """The facts that the documents state, the same for every seed: the answers, for who writes questions."""
    draw = Draw("biomedlm_jax.synthetic: the world")
    diseases = tuple(
        Disease(name, *draw.choice(OUTCOMES))
        for name in _names(
            draw,
            N_DISEASES,
            "nephro hepato cardio dermo neuro gastro pneumo myelo angio adeno rhino uro",
            "fasci sial plex thym ductul gangli tubul sept lamin cist valv",
            "itis opathy osclerosis omalacia odystrophy oma",
        )
    )
    pathways = _names(draw, N_PATHWAYS, "Vel Tar Nor Quin Mos Hal Bren Sil", "kin vane dro mer tix", "in al or")
    symbols = _names(
        draw, N_GENES, "BZ CQ DV FJ GX HV JR KV LQ MZ NX PQ QR RZ TV WX ZD", "A D K M P T", "1 2 3 4 5 6 7 8"
    )
    genes = tuple(
        Gene(symbol, draw.choice(pathways), draw.choice(TISSUES), disease)
        for symbol, disease in zip(symbols, itertools.cycle(diseases), strict=False)
    )
    names = _names(
        draw,
        N_DRUGS,
        "bra cor dal fen gal jel kor lum mev nor pel quil rov sul tav vex zan oxy",
        "a e i ovi umi ela ori ama",
        " ".join(ACTIONS),
    )
    drugs = tuple(
        Drug(
            name,
            next(action for ending, action in ACTIONS.items() if name.endswith(ending)),
            target,
            draw.choice(ADVERSE_EVENTS),
        )
        for name, target in zip(names, itertools.cycle(genes), strict=False)
    )
    return KnowledgeBase(drugs, genes, diseases)


# --- Numbers -----------------------------------------------------------------------------------------------------

# Groups are multiples of 50 and rates are even percentages: every count is a whole number, and a product of two small
# numbers that a model can learn.
GROUP_SIZES = range(50, 401, 50)
CONTROL_RATES = range(20, 62, 2)
RATES = range(2, 98, 2)
RARE_RATES = range(4, 22, 2)
COMPARATORS = ("placebo", "standard care", "active control", "best supportive care")


def _z(n1: int, percent1: int, n2: int, percent2: int) -> float:
    """Statistic of the two-proportion z-test with pooled variance."""
    p1, p2 = percent1 / 100, percent2 / 100
    pooled = (n1 * p1 + n2 * p2) / (n1 + n2)
    return (p1 - p2) / math.sqrt(pooled * (1 - pooled) * (1 / n1 + 1 / n2))


def _significance(z: float) -> str:
    """For the z that `_rates` allows: there is none between 1 and 1.96."""
    bounds = ((3.291, "P < 0.001"), (2.576, "P < 0.01"), (1.960, "P < 0.05"), (0, "P > 0.3"))
    return next(label for bound, label in bounds if abs(z) >= bound)


@functools.cache
def _rates(n1: int, n2: int, percent2: int, verdict: str) -> list[int]:
    """Rates of group 1 that bear the verdict out: significant at 5 %, or nowhere near (|z| < 1 is P > 0.3)."""
    fits: dict[str, Callable[[float], bool]] = {
        "higher": lambda z: z >= 1.960,
        "lower": lambda z: z <= -1.960,
        "equal": lambda z: abs(z) < 1,
    }
    return [percent for percent in RATES if fits[verdict](_z(n1, percent, n2, percent2))]


def _two_groups(draw: Draw, verdict: str) -> dict[str, Any]:
    """Events in two groups whose rates compare as the verdict says ("higher": more of them in group 1)."""
    n1, n2, percent2 = draw.choice(GROUP_SIZES), draw.choice(GROUP_SIZES), draw.choice(CONTROL_RATES)
    percent1 = draw.choice(_rates(n1, n2, percent2, verdict))
    return {
        "n": n1 + n2,
        "n1": n1,
        "n2": n2,
        "p1": percent1,
        "p2": percent2,
        "r1": n1 * percent1 // 100,
        "r2": n2 * percent2 // 100,
        "difference": abs(percent1 - percent2),
        "significance": _significance(_z(n1, percent1, n2, percent2)),
    }


# --- The kinds of document ---------------------------------------------------------------------------------------
# Each draws its values and names the slots of its sentences, title first. Sentences must tell every value drawn.

# The words of a change: one set of templates serves both directions.
UP = {
    "rose": "rose",
    "raises": "raises",
    "raised": "raised",
    "increase": "increase",
    "increased": "increased",
    "higher": "higher",
    "activates": "activates",
    "activation": "activation",
}
DOWN = {
    "rose": "fell",
    "raises": "lowers",
    "raised": "lowered",
    "increase": "reduction",
    "increased": "reduced",
    "higher": "lower",
    "activates": "inhibits",
    "activation": "inhibition",
}


def _other(draw: Draw, options: Sequence[T], own: T) -> T:
    """Any option but `own`."""
    return draw.choice([option for option in options if option != own])


def _trial(draw: Draw, world: KnowledgeBase) -> Filling:
    drug, helps = draw.choice(world.drugs), draw.choice((True, False))
    disease = drug.indication if helps else _other(draw, world.diseases, drug.indication)
    verdict = "equal" if not helps else "higher" if disease.desirable else "lower"
    groups, harmed = _two_groups(draw, verdict), draw.choice(RARE_RATES)
    values = {
        "drug": drug.name,
        "action": drug.action,
        "target": drug.target.symbol,
        "disease": disease.name,
        "indication": drug.indication.name,
        "outcome": disease.outcome,
        "adverse": drug.adverse_event,
        "comparator": draw.choice(COMPARATORS),
        "dose": draw.choice(range(10, 90, 10)),
        "weeks": draw.choice(range(8, 56, 4)),
        "p3": harmed,
        "r3": groups["n1"] * harmed // 100,
        **groups,
        **(UP if disease.desirable else DOWN),
    }
    aim, change = ("helps", "changed") if helps else ("fails", "equal")
    return [
        "trial.title",
        f"trial.background.{aim}",
        "trial.aim",
        "trial.methods",
        "trial.endpoint",
        "trial.result",
        f"trial.difference.{change}",
        "trial.safety",
        f"trial.conclusion.{change}",
        f"trial.advice.{aim}",
    ], values


def _association(draw: Draw, world: KnowledgeBase) -> Filling:
    gene, linked = draw.choice(world.genes), draw.choice((True, False))
    disease = gene.disease if linked else _other(draw, world.diseases, gene.disease)
    verdict = "higher" if linked else "equal"
    values = {
        "gene": gene.symbol,
        "pathway": gene.pathway,
        "tissue": gene.tissue,
        "disease": disease.name,
        **_two_groups(draw, verdict),
    }
    return [
        "gene.title",
        "gene.background",
        "gene.aim",
        "gene.methods",
        "gene.result",
        f"gene.difference.{verdict}",
        f"gene.expression.{verdict}",
        f"gene.conclusion.{verdict}",
    ], values


def _mechanism(draw: Draw, world: KnowledgeBase) -> Filling:
    drug, change = draw.choice(world.drugs), draw.choice(range(20, 82, 2))
    before, treated, control = draw.choice(GROUP_SIZES), draw.choice(range(6, 17)), draw.choice(range(6, 17))
    sign, words = (1, UP) if drug.action == RAISING else (-1, DOWN)
    values = {
        "drug": drug.name,
        "action": drug.action,
        "target": drug.target.symbol,
        "pathway": drug.target.pathway,
        "disease": drug.indication.name,
        "tissue": drug.target.tissue,
        "change": change,
        "before": before,
        "after": before + sign * before * change // 100,
        "other": _other(draw, world.genes, drug.target).symbol,
        "dose": draw.choice((1, 2, 5, 10, 20, 50)),
        "hours": draw.choice((6, 12, 24, 48)),
        "treated": treated,
        "control": control,
        "mice": treated + control,
        **words,
    }
    return [
        "cell.title",
        "cell.background",
        "cell.aim",
        "cell.methods",
        "cell.result",
        "cell.specificity",
        "cell.mice",
        "cell.severity",
        "cell.conclusion",
    ], values


def _case_report(draw: Draw, world: KnowledgeBase) -> Filling:
    drug, causal = draw.choice(world.drugs), draw.choice((True, False))
    adverse = drug.adverse_event if causal else _other(draw, ADVERSE_EVENTS, drug.adverse_event)
    patient, they, their = draw.choice((("woman", "she", "her"), ("man", "he", "his")))
    onset, duration = draw.choice(range(2, 31)), draw.choice(range(3, 22))
    values = {
        "drug": drug.name,
        "action": drug.action,
        "target": drug.target.symbol,
        "disease": drug.indication.name,
        "adverse": adverse,
        "patient": patient,
        "they": they,
        "their": their,
        "age": draw.choice(range(19, 80)),
        "onset": onset,
        "duration": duration,
        "total": onset + duration,
        "dose": draw.choice(range(10, 90, 10)),
    }
    verdict = "causal" if causal else "chance"
    return [
        "case.title",
        "case.background",
        "case.patient",
        "case.onset",
        "case.search",
        f"case.course.{verdict}",
        f"case.conclusion.{verdict}",
        f"case.advice.{verdict}",
    ], values


KINDS: dict[str, Callable[[Draw, KnowledgeBase], Filling]] = {
    "trial": _trial,
    "association": _association,
    "mechanism": _mechanism,
    "case report": _case_report,
}


@dataclass(frozen=True)
class SyntheticDocument:
    """A text, `title\\nabstract` like The Pile's abstracts, and minus its log-probability in nats."""

    text: str
    entropy: float


def generate(
    index: int, seed: int = 0, world: KnowledgeBase | None = None, kinds: Sequence[str] = tuple(KINDS)
) -> SyntheticDocument:
    """Document `index` of `seed`.

    Args:
      world: the part of the `knowledge_base` that it is about; by default all of it.
      kinds: what it may be, some of `KINDS`.
    """
    draw = Draw(f"{seed}:{index}")
    slots, values = KINDS[draw.choice(kinds)](draw, world or knowledge_base())
    values |= {name.capitalize(): value[0].upper() + value[1:] for name, value in values.items() if type(value) is str}
    title, *sentences = [draw.choice(VARIANTS[slot]).format_map(values) for slot in slots]
    return SyntheticDocument(title + "\n" + " ".join(sentences), math.log(draw.outcomes))


def documents(start: int, stop: int, seed: int = 0) -> Iterator[Document]:
    """Documents `start` to `stop` - 1 of `seed`; ranges that do not overlap are held out from each other."""
    return (Document(generate(index, seed).text, "synthetic") for index in range(start, stop))


# --- The sentences -----------------------------------------------------------------------------------------------
# "# slot", then its templates, one a line (longer ones go on, indented): [a|b] is a choice, {x} a value. A slot's
# sentences are all the ways to choose in all its templates, each as likely as any other. No two may spell the same
# text, whatever the values, and none may hold ". ", so that a text parses into sentences, and these into draws.

TEMPLATES = """
# trial.title
{Drug} [for|in the treatment of|in patients with] {disease}: a [randomized|randomized controlled|double-blind] trial
[Efficacy and safety|Efficacy|Clinical effects] of {drug} [compared with|versus] {comparator} in {disease}
[A multicenter|A parallel-group|An investigator-initiated] trial of {drug} in [adults|patients|outpatients] with
  {disease}
# trial.background.helps
{Drug} is {action} {target}, [a driver|a central mediator|a known cause|a key regulator] of {disease}.
[Abnormal|Disturbed|Altered] signaling through {target} [contributes to|promotes|underlies] {disease}, and {drug} is
  {action} {target}.
{Disease} [has been linked|is closely linked] to {target}, and {drug} [was developed|was designed|is known] as {action}
  {target}.
# trial.background.fails
{Drug} is {action} {target}, which [is implicated in|contributes to] {indication}; its value in {disease} is
  [unknown|uncertain|disputed|unproven].
Although {drug}, {action} {target}, is [used|effective|approved] in {indication}, [little is known|data are lacking]
  about {disease}.
# trial.aim
We [asked|tested|investigated|examined] whether {drug} [improves outcomes|is of benefit|is superior to {comparator}] in
  [this condition|this disease|these patients].
[The aim of this study was|Our objective was|We aimed] to [assess|evaluate|determine] the [efficacy|clinical benefit] of
  {drug} in {disease}.
# trial.methods
[A total of|In all,] {n} [patients|adults|participants|volunteers] were [randomly assigned|randomized] to {drug} {dose}
  mg daily (n = {n1}) or {comparator} (n = {n2}) for {weeks} weeks.
At [nine hospitals|several centers|university clinics], {n} [adults|patients|outpatients] were allocated to receive
  {drug} at {dose} mg [per day|daily] (n = {n1}) or {comparator} (n = {n2}) [over|during] {weeks} weeks.
[Of|Among] {n} [patients enrolled|eligible patients|randomized patients], {n1} received {drug} ({dose} mg [daily|once a
  day]) and {n2} received {comparator} for {weeks} weeks.
# trial.endpoint
The [primary|main|prespecified] [endpoint|outcome measure] was {outcome} [at the end of treatment|by week {weeks}].
[Analyses were by intention to treat|Analysis followed the intention-to-treat principle|Outcome assessors were unaware
  of treatment], with {outcome} as the primary [outcome|endpoint].
# trial.result
{Outcome} [occurred|was observed|was recorded|was documented] in {r1} of {n1} patients ({p1}%) [given|receiving] {drug}
  and in {r2} of {n2} ({p2}%) [given|receiving|assigned to] {comparator} ({significance}).
[At|By] week {weeks}, {r1} of {n1} patients in the {drug} group ({p1}%) and {r2} of {n2} in the {comparator} group
  ({p2}%) [had experienced|met the criteria for|had] {outcome} ({significance}).
The [rate|frequency|incidence] of {outcome} was {p1}% ({r1} of {n1}) with {drug} and {p2}% ({r2} of {n2}) with
  {comparator} ({significance}).
# trial.difference.changed
[This corresponds to|This amounts to|The result was] an [absolute|overall] {increase} of {difference} percentage points.
[Compared with|Relative to] {comparator}, the rate [{rose}|was {higher}] by {difference} percentage points.
# trial.difference.equal
The [groups|treatments|two arms] did not differ [significantly|appreciably], being {difference} percentage points apart.
The difference of {difference} percentage points was [not significant|well within chance|of no clinical importance].
# trial.safety
{Adverse} was the most [common|frequent] adverse event, [affecting|reported by|noted in] {r3} patients ({p3}%) treated
  with {drug}.
[Tolerability was acceptable|There were no treatment-related deaths|Adverse events were mostly mild], but {adverse}
  [developed|arose|was noted] in {r3} of {n1} patients ({p3}%) in the {drug} group.
# trial.conclusion.changed
{Drug} [{raised}|{increased}|significantly {increased}] the rate of {outcome} in [patients with|adults with] {disease}.
[In conclusion|In summary|Thus], treatment with {drug} {raises} the [likelihood|probability] of {outcome} in {disease}.
# trial.conclusion.equal
{Drug} [did not change|had no effect on|did not alter|failed to modify] the rate of {outcome} in {disease}.
[In conclusion|In summary|Thus], treatment with {drug} does not [affect|influence] the likelihood of {outcome} in
  {disease}.
# trial.advice.helps
These [data|findings|results] [support|favor|justify] the use of {drug} in [clinical practice|routine care|this
  setting].
[Longer follow-up|A confirmatory trial|Comparison with other agents] is [warranted|desirable] before {drug} [becomes
  first-line therapy|is widely adopted].
# trial.advice.fails
These [data|findings|results] do not support the use of {drug} in [clinical practice|routine care|this setting].
[Other approaches|Alternative strategies|Different targets] are [needed|required] for [this disorder|these patients].
# gene.title
[Common|Rare|Inherited|Coding] variants of {gene} and [the risk of|susceptibility to|predisposition to] {disease}
[Is {gene} associated with|Does {gene} influence the risk of|Do {gene} variants predispose to] {disease}?
{Gene} polymorphism in {disease}: [a case-control study|a genetic association study|evidence from two cohorts]
# gene.background
{Gene} is [a component|a member|an essential element] of the {pathway} pathway and is [expressed mainly|most abundant]
  in the {tissue}.
The {pathway} pathway [depends on|requires|is controlled by] {gene}, whose [expression|transcript level] is highest in
  the {tissue}.
[In|Within] the {tissue}, where it is [most strongly|predominantly] expressed, {gene} [acts in|participates in|feeds
  into] the {pathway} pathway.
# gene.aim
[Its|The] [contribution|relevance|relation] to {disease} [has not been settled|remains controversial|is poorly
  understood].
We [sought to determine|set out to learn|examined] whether [inherited|genetic] variation [in|at] {gene} [predisposes
  to|influences the risk of] {disease}.
# gene.methods
We [genotyped|sequenced|studied|recruited] {n} [individuals|subjects|unrelated persons], {n1} with {disease} and {n2}
  [healthy|unaffected|matched] controls.
[Blood|Saliva|Genomic DNA] samples from {n1} [patients|cases] and {n2} [controls|blood donors] ({n} in total) were
  [analyzed|sequenced].
# gene.result
[The variant|The risk allele|The minor allele] was [carried by|present in|detected in] {r1} of {n1} patients ({p1}%) and
  {r2} of {n2} controls ({p2}%; {significance}).
[Carriers made up|Carriers accounted for] {p1}% of patients ({r1} of {n1}) and {p2}% of controls ({r2} of {n2};
  {significance}).
# gene.difference.higher
[Carriage|Carrier frequency] was [thus|therefore] {difference} percentage points [more common|higher] among patients.
[The excess|This excess] of {difference} percentage points [persisted|remained] after adjustment for [age|sex|ancestry].
# gene.difference.equal
[Carriage|Carrier frequency] [thus|therefore] differed by only {difference} percentage points, [a chance finding|a
  trivial amount].
[The gap|This gap] of {difference} percentage points [vanished|lost all meaning] after adjustment for
  [age|sex|ancestry].
# gene.expression.higher
[In biopsy specimens|In tissue sections|On immunohistochemistry], {gene} protein was [abnormal|altered] in affected
  {tissue}.
[Functional assays|Reporter assays|Knockdown experiments] [confirmed|showed] that the variant [disrupts|disturbs]
  {pathway} signaling.
# gene.expression.equal
[In biopsy specimens|In tissue sections|On immunohistochemistry], {gene} protein was [normal|unremarkable] in the
  {tissue}.
[Functional assays|Reporter assays|Knockdown experiments] [confirmed|showed] that the variant [spares|preserves]
  {pathway} signaling.
# gene.conclusion.higher
[Variation|Genetic variation] [in|at] {gene} [confers susceptibility to|is a risk factor for|is associated with]
  {disease}.
[Our data|These observations|The findings] [implicate|point to] {gene} in the [pathogenesis|etiology|origin] of
  {disease}.
# gene.conclusion.equal
[Variation|Genetic variation] [in|at] {gene} is [not associated with|no risk factor for|unrelated to] {disease}.
[Our data|These observations|The findings] [argue against|exclude|rule out] a [major|causal|direct] role of {gene} in
  {disease}.
# cell.title
{Drug} [modulates|regulates|acts on] the {pathway} pathway [through|by way of|via] {target} in [models|a model] of
  {disease}
[Molecular|Cellular|Pharmacological] [mechanism|basis] of [action of {drug}|the effect of {drug}] in {disease}
{Target} [mediates|accounts for|explains] the [effects|actions|activity] of {drug} in [experimental|murine] {disease}
# cell.background
{Drug} is {action} {target}, [a member|a component|an element] of the {pathway} pathway.
[Within|In] the {pathway} pathway, {target} is [the molecular target of|bound by|recognized by] {drug}.
The {pathway} pathway [includes|comprises|contains] {target}, [against which|for which] {drug} was [developed|selected].
# cell.aim
[How this|How binding|How such an interaction] [relates to|bears on|matters for] {disease} is [unclear|not well
  understood].
[Here we|We therefore|In this study we] [characterized|explored|analyzed|dissected] its [effects|consequences] in [cell
  culture|isolated cells] and in a mouse model of {disease}.
# cell.methods
[Primary|Cultured|Immortalized] {tissue} cells were [exposed to|incubated with|treated with] {dose} uM {drug} for
  {hours} hours.
[After|Following] {hours} hours with {drug} ({dose} uM), {tissue} cells were [lysed|harvested|collected] for
  [immunoblotting|enzyme assays|quantitative PCR|mass spectrometry].
# cell.result
[Activity of {target}|{Target} activity|Signaling by {target}] {rose} from {before} to {after} units,
  [a change|an overall {increase}] of {change}%.
{Drug} [{raised}|{increased}] {target} activity by {change}%, from {before} to {after} units.
# cell.specificity
[The unrelated protein|The activity of|Expression of] {other} [was not affected|did not change|was unaltered].
[No effect on|No binding to|No interaction with] {other} was [seen|detected|found], [indicating|suggesting] selectivity.
# cell.mice
[Of|Among] {mice} mice, {treated} [received|were given] {drug} and {control} [received|were given] [vehicle|saline].
[Experiments|Studies] in {mice} mice ({treated} treated, {control} controls) [confirmed|reproduced|extended] [these
  findings|this result].
# cell.severity
[{Higher}|{Increased}] {pathway} [signaling|activity] in [vivo|treated animals] was [accompanied|followed] by
  [milder disease|fewer lesions|longer survival].
[Animals|Mice] with {pathway} {activation} had [milder disease|fewer lesions|longer survival].
# cell.conclusion
{Drug} [thus|therefore] {activates} {pathway} signaling [through|via] {target}, a [promising|rational] approach to
  {disease}.
[We conclude|The data show|Our results indicate] that {activation} of {target} by {drug} [ameliorates|protects against]
  {disease}.
# case.title
{Adverse} during [treatment|therapy] with {drug}: [a case report|report of a case|a diagnostic challenge]
[A patient|A {patient}|An adult] with {adverse} [while taking|after starting|on] {drug}
[Unexpected|Severe|Troublesome|Persistent] {adverse} in [a {patient}|a patient] [treated with|receiving] {drug} for
  {disease}
# case.background
{Drug}, {action} {target}, is [used|prescribed|indicated|licensed] for {disease}.
[Patients with|People with|Adults with] {disease} [may be|are often] treated with {drug}, {action} {target}.
# case.patient
A {age}-year-old {patient} with {disease} [was started on|began taking|was prescribed] {drug} at {dose} mg [daily|a
  day|each morning].
We [describe|report on|present] a {age}-year-old {patient} whose {disease} was [treated|managed] with {drug} ({dose} mg
  [daily|per day]).
# case.onset
{They} [developed|complained of|presented with|noticed] {adverse} {onset} days [later|after the first dose].
{Adverse} [began|appeared|set in] {onset} days [later|after the first dose] and [disturbed|interrupted|limited] {their}
  [work|sleep|daily life].
# case.search
[Physical examination|Laboratory tests|Imaging] [revealed|showed] [no other cause|no alternative explanation].
[Infection|Malignancy|Thyroid disease|A drug interaction] was [excluded|ruled out|considered unlikely].
# case.course.causal
{Drug} was [stopped|withdrawn|discontinued], and the {adverse} [resolved|disappeared] within {duration} days, {total}
  days after the first dose; it [recurred|returned] on rechallenge.
[On withdrawal|After discontinuation], {they} recovered in {duration} days, {total} days after the first dose, but
  rechallenge [provoked|reproduced] the {adverse}.
# case.course.chance
{Drug} was continued, and the {adverse} [resolved|disappeared] within {duration} days, {total} days after the first
  dose; it [never recurred|did not return].
[Without withdrawal|Despite continued treatment], {they} recovered in {duration} days, {total} days after the first
  dose, and the {adverse} [stayed away|did not recur].
# case.conclusion.causal
[This course|The time course|The sequence of events] [indicates|suggests] that the {adverse} was caused by {drug}.
[We consider|We believe] {drug} the [probable|likely] cause of the {adverse}.
# case.conclusion.chance
[This course|The time course|The sequence of events] [indicates|suggests] that the {adverse} was not caused by {drug}.
[We consider|We believe] {drug} an [improbable|unlikely] cause of the {adverse}.
# case.advice.causal
[Clinicians|Physicians|Prescribers] should be [aware|mindful] of this [reaction|complication|adverse effect].
[Patients|Those treated] should be [warned|counseled|informed] [before|when] therapy [begins|is started].
# case.advice.chance
[Clinicians|Physicians|Prescribers] should [look for other causes|avoid hasty withdrawal|not stop useful drugs too
  soon].
[Coincidence|Chance] should be [considered|remembered] [before|when] a drug is [blamed|withdrawn].
"""


def _variants(template: str) -> list[str]:
    """Every way to choose: "[a|b] {x}" -> "a {x}", "b {x}"."""
    parts = re.split(r"\[(.*?)\]", template)  # what stands between brackets is at the odd places
    options = [part.split("|") if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*options)]


def _parse(templates: str) -> dict[str, list[str]]:
    slots = (section.splitlines() for section in re.sub("\n +", " ", templates).split("# ")[1:])
    return {slot: [variant for line in lines for variant in _variants(line)] for slot, *lines in slots}


VARIANTS = _parse(TEMPLATES)
