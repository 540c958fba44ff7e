"""The bundled corpus: texts are parsed back into draws, numbers and facts, by rules written down again here."""

import functools
import hashlib
import itertools
import math
import re
from collections import Counter

import pytest

from biomedlm_jax import synthetic
from biomedlm_jax.synthetic import TEMPLATES, VARIANTS, Draw, generate, knowledge_base

WORLD = knowledge_base()
DRUGS = {drug.name: drug for drug in WORLD.drugs}
GENES = {gene.symbol: gene for gene in WORLD.genes}
DISEASES = {disease.name: disease for disease in WORLD.diseases}

# What a value can look like: as wide as possible, so that a text which parses in one way does so for any value.
WORD, NAME, SYMBOL = "[a-z]+", "[A-Z][a-z]+", "[A-Z]{3}[0-9]"
PATTERNS = {
    "drug": WORD,
    "disease": WORD,
    "indication": WORD,
    "adverse": WORD,
    "tissue": WORD,
    "pathway": NAME,
    "target": SYMBOL,
    "gene": SYMBOL,
    "other": SYMBOL,
    "significance": r"P [<>] 0\.\d+",
    "patient": "woman|man",
    "they": "she|he",
    "their": "her|his",
    "action": "an? [a-z ]+",
    "outcome": "|".join(name for name, _ in synthetic.OUTCOMES),
    "comparator": "|".join(synthetic.COMPARATORS),
    **{word: f"{synthetic.UP[word]}|{synthetic.DOWN[word]}" for word in synthetic.UP},
}


def first_upper(pattern: str) -> str:
    return "|".join(
        re.sub(r"^\[a-z\]", "[A-Z][a-z]", word) if word[0] == "[" else word.capitalize() for word in pattern.split("|")
    )


def field_pattern(name: str) -> str:
    lower = name.lower()
    pattern = PATTERNS.get(lower, r"\d+")
    return first_upper(pattern) if name != lower and pattern not in (NAME, SYMBOL) else pattern


@functools.cache
def matcher(variant: str) -> re.Pattern[str]:
    seen: set[str] = set()
    parts = []
    for literal, field in re.findall(r"([^{]*)(?:\{(\w+)\})?", variant):
        parts.append(re.escape(literal))
        if field:
            parts.append(f"(?P={field})" if field in seen else f"(?P<{field}>{field_pattern(field)})")
            seen.add(field)
    return re.compile("".join(parts))


# Slots in the order of a document: kind -> [[slots that exclude each other], ...].
ORDER = {
    kind: [list(slots) for _, slots in itertools.groupby(group, key=lambda slot: slot.split(".")[1])]
    for kind, group in itertools.groupby(VARIANTS, key=lambda slot: slot.split(".")[0])
}


def matches(sentence: str, slots: list[str]) -> list[tuple[str, str, dict[str, str]]]:
    return [
        (slot, variant, match.groupdict())
        for slot in slots
        for variant in VARIANTS[slot]
        if (match := matcher(variant).fullmatch(sentence))
    ]


def parse(text: str) -> tuple[list[str], dict[str, str]]:
    """The slots and values of a document; fails where a sentence can be read in no way or in two."""
    title, abstract = text.split("\n")
    sentences = [title, *re.split(r"(?<=[.]) ", abstract)]
    ((title_slot, _, _),) = matches(title, [f"{kind}.title" for kind in ORDER])
    order = ORDER[title_slot.split(".")[0]]
    assert len(sentences) == len(order)
    used, values = [], {}
    for sentence, slots in zip(sentences, order, strict=True):
        ((slot, _, found),) = matches(sentence, slots)
        used.append(slot)
        for field, value in found.items():
            lower = field.lower()
            value = value[0].lower() + value[1:] if field != lower and field_pattern(lower)[:5] != "[A-Z]" else value
            assert values.setdefault(lower, value) == value, f"{field} is told in two ways: {text}"
    return used, values


@functools.cache
def document(index: int):
    generated = generate(index, seed=7)
    return generated, *parse(generated.text)


def of_kind(kind: str, count: int = 600):
    parsed = [document(index) for index in range(count)]
    return [(made, slots, values) for made, slots, values in parsed if slots[0] == f"{kind}.title"]


# --- A function of seed and index --------------------------------------------------------------------------------


def test_documents_depend_on_seed_and_index_only():
    texts = [generate(index, 3).text for index in range(50)]
    assert [generate(index, 3).text for index in reversed(range(50))] == texts[::-1]
    assert [made.text for made in synthetic.documents(10, 20, 3)] == texts[10:20]
    assert {made.source for made in synthetic.documents(0, 5)} == {"synthetic"}
    assert not set(texts) & {generate(index, 4).text for index in range(50)}
    assert generate(1, 23).text != generate(12, 3).text


def test_texts_are_the_same_on_every_machine():
    """Where the generator is changed on purpose, so is this; numbers measured before are not comparable."""
    texts = "\0".join(generate(index).text for index in range(100))
    digest = hashlib.sha256(texts.encode()).hexdigest()
    assert digest == "e14c8517841b49c2c43fb31e69294f4840a4cfc646162cf1bdb76526c075e90f"


def test_texts_differ_and_have_the_vocabulary_of_a_corpus():
    texts = [made.text for made in synthetic.documents(0, 5000)]
    assert len(set(texts)) == 5000
    words = Counter(word.lower() for text in texts for word in re.findall(r"[A-Za-z][\w-]*|\d+", text))
    assert 1500 < len(words) < 3000
    assert all(text.isascii() and text.isprintable() for text in "".join(texts).split("\n"))
    assert not any(re.search(r"[{}\[\]|]|  | [.,;]|\b[Aa] [aeiou]|\b[Aa]n [bcdfgkmprstv]", text) for text in texts)


# --- The entropy -------------------------------------------------------------------------------------------------


def own_z(values: dict[str, str], percent1: int) -> float:
    n1, n2, r2 = (int(values[name]) for name in ("n1", "n2", "r2"))
    r1 = n1 * percent1 / 100
    pooled = (r1 + r2) / (n1 + n2)
    return (r1 / n1 - r2 / n2) / math.sqrt(pooled * (1 - pooled) * (1 / n1 + 1 / n2))


def recount(slots: list[str], values: dict[str, str]) -> float:
    """Log of the number of ways to draw, from the text."""
    ways = [4, *(len(set(VARIANTS[slot])) for slot in slots)]
    kind = slots[0].split(".")[0]
    if kind in ("trial", "gene"):
        ways += [8, 8, 21]  # sizes of the groups, rate of the second
        z = own_z(values, int(values["p1"]))
        same = (lambda other: abs(other) < 1) if abs(z) < 1 else (lambda other: other * z > 0 and abs(other) >= 1.96)
        ways.append(sum(same(own_z(values, percent)) for percent in range(2, 98, 2)))
    if kind == "trial":
        ways += [360, 2, 9, 4, 8, 12]  # drug, helps or not, rate of harm, comparator, dose, weeks
        ways += [149] if values["disease"] != DRUGS[values["drug"]].indication.name else []
    elif kind == "gene":
        ways += [240, 2] + ([149] if values["disease"] != GENES[values["gene"]].disease.name else [])
    elif kind == "cell":
        ways += [360, 31, 8, 11, 11, 239, 6, 4]  # drug, change, before, mice twice, other gene, dose, hours
    else:
        ways += [360, 2, 2, 29, 19, 61, 8]  # drug, causal or not, sex, onset, duration, age, dose
        ways += [23] if values["adverse"] != DRUGS[values["drug"]].adverse_event else []
    return sum(map(math.log, ways))


def test_the_entropy_is_that_of_the_draws_that_the_text_tells():
    for made, slots, values in map(document, range(600)):
        assert made.entropy == pytest.approx(recount(slots, values), abs=1e-9)


DRAWN = {
    "trial": "drug disease n1 n2 p1 p2 p3 comparator dose weeks",
    "gene": "gene disease n1 n2 p1 p2",
    "cell": "drug change before treated control other dose hours",
    "case": "drug adverse patient onset duration age dose",
}


@pytest.mark.parametrize("kind", ORDER)
def test_every_text_tells_every_value_drawn(kind):
    for _, _, values in of_kind(kind):
        assert set(DRAWN[kind].split()) <= set(values)


@pytest.mark.parametrize("slot", VARIANTS)
def test_every_sentence_is_read_in_one_way_for_any_values(slot):
    kind, name = slot.split(".")[:2]
    (slots,) = [slots for slots in ORDER[kind] if slots[0].split(".")[1] == name]
    slots = [f"{kind}.title" for kind in ORDER] if name == "title" else slots
    assert len(set(VARIANTS[slot])) == len(VARIANTS[slot]) > 1
    for words, variant in itertools.product((synthetic.UP, synthetic.DOWN), VARIANTS[slot]):
        lower = {
            "drug": "bratinib",
            "disease": "osteoma",
            "indication": "otitis",
            "adverse": "fever",
            "tissue": "skin",
            "pathway": "Velkin",
            "target": "ABC1",
            "gene": "ABD2",
            "other": "ABE3",
            "significance": "P > 0.3",
            "patient": "man",
            "they": "he",
            "their": "his",
            "action": "an agonist of",
            "outcome": "relapse",
            "comparator": "placebo",
            **words,
        }
        values = {
            **dict.fromkeys(re.findall(r"\{(\w+)\}", variant), "40"),
            **lower,
            **{field.capitalize(): value[0].upper() + value[1:] for field, value in lower.items()},
        }
        sentence = variant.format_map(values)
        assert ". " not in sentence and (name == "title" or sentence.endswith("."))
        assert [(found, read) for found, read, _ in matches(sentence, slots)] == [(slot, variant)]


class Scripted(Draw):
    """Draws that follow a script as far as it goes, then take the first option."""

    def __init__(self, script):
        super().__init__("")
        self.script, self.taken = script, []

    def choice(self, options):
        at = self.script[len(self.taken)] if len(self.taken) < len(self.script) else 0
        self.taken.append((at, len(options)))
        self.outcomes *= len(options)
        return options[at]


def every_outcome(function):
    """(result, entropy) of every series of draws: the script is counted up like an odometer."""
    script = []
    while script is not None:
        draw = Scripted(script)
        yield function(draw), math.log(draw.outcomes)
        taken = list(draw.taken)
        while taken and taken[-1][0] == taken[-1][1] - 1:
            taken.pop()
        script = [at for at, _ in taken[:-1]] + [taken[-1][0] + 1] if taken else None


@pytest.mark.parametrize("verdict", ["higher", "lower", "equal"])
def test_probabilities_of_all_groups_sum_to_one_and_no_two_are_the_same(verdict):
    outcomes = list(every_outcome(lambda draw: synthetic._two_groups(draw, verdict)))
    assert len(outcomes) > 8 * 8 * 21
    assert math.fsum(math.exp(-entropy) for _, entropy in outcomes) == pytest.approx(1)
    assert len({tuple(values.values()) for values, _ in outcomes}) == len(outcomes)


def test_draws_are_uniform_and_counted():
    draw = Draw("x")
    counts = Counter(draw.choice("abcde") for _ in range(10_000))
    assert draw.outcomes == 5**10_000
    assert sorted(counts) == list("abcde") and all(abs(count - 2000) < 200 for count in counts.values())
    firsts = Counter(Draw(f"0:{index}").choice("abcd") for index in range(4000))
    assert all(abs(count - 1000) < 150 for count in firsts.values())
    assert Counter(generate(i).text.split("\n")[0] for i in range(4000)).most_common(1)[0][1] < 5


def test_variants_are_all_the_ways_to_choose():
    assert synthetic._variants("[a|b] {x} [c|d|e].") == [f"{one} {{x}} {two}." for one in "ab" for two in "cde"]
    assert synthetic._parse("\n# s.t\n[a|b]\n  c\nd\n# u.v\ne\n") == {"s.t": ["a c", "b c", "d"], "u.v": ["e"]}
    assert set(VARIANTS) == set(re.findall(r"^# (\S+)$", TEMPLATES, re.M))


# --- Numbers and their conclusions, by expressions that know nothing of the templates ----------------------------


@functools.cache
def texts() -> list[str]:
    return [made.text for made in synthetic.documents(0, 2000, seed=1)]


def test_counts_percentages_and_totals_agree():
    shares = totals = 0
    for text in texts():
        numbers = set(map(int, re.findall(r"\d+", text)))
        for count, of, percent in re.findall(r"(\d+) of (\d+)[a-z -]* \((\d+)%", text):
            assert int(count) * 100 == int(of) * int(percent), text
            shares += 1
        for percent, count, of in re.findall(r"(\d+)%[a-z ]* \((\d+) of (\d+)", text):
            assert int(count) * 100 == int(of) * int(percent), text
            shares += 1
        groups = re.findall(r"n = (\d+)", text)
        if groups:
            assert sum(map(int, groups)) in numbers, text
            totals += 1
    assert shares > 1500 and totals > 200


def test_totals_of_every_kind():
    for _, _, values in of_kind("trial") + of_kind("gene"):
        n, n1, n2, r1, r2, p1, p2 = (int(values[name]) for name in ("n", "n1", "n2", "r1", "r2", "p1", "p2"))
        assert n1 + n2 == n and r1 * 100 == p1 * n1 and r2 * 100 == p2 * n2
        assert int(values["difference"]) == abs(p1 - p2)
        z = abs(own_z(values, p1))
        p = math.erfc(z / math.sqrt(2))
        relation, bound = re.fullmatch(r"P ([<>]) (.*)", values["significance"]).groups()
        assert p > 0.3 if (relation, bound) == (">", "0.3") else p < float(bound)
        if bound in ("0.05", "0.01"):  # the tightest bound is given
            assert p > {"0.05": 0.01, "0.01": 0.001}[bound] * 0.99
    for _, _, values in of_kind("trial"):
        assert int(values["r3"]) * 100 == int(values["p3"]) * int(values["n1"])
    for _, _, values in of_kind("cell"):
        before, after, change, mice, treated, control = (
            int(values[name]) for name in ("before", "after", "change", "mice", "treated", "control")
        )
        assert abs(after - before) * 100 == change * before and treated + control == mice
    for _, _, values in of_kind("case"):
        assert int(values["onset"]) + int(values["duration"]) == int(values["total"])


def test_conclusions_follow_the_results():
    signs = Counter()
    for text in texts():
        result = re.search(
            r"(?:\((\d+)%\).*?in \d+ of \d+|\((\d+)%\) and \d+ of \d+|was (\d+)% \()"
            r".*?(\d+)%.*?(P . 0\.\d+)",
            text,
        )
        if not result or "controls" in text:
            continue
        first, second = int(next(filter(None, result.groups()[:3]))), int(result[4])
        sign = 0 if result[5] == "P > 0.3" else 1 if first > second else -1
        end = re.split(r"percentage points", text)[1]
        stated = [
            word
            for word, claim in {
                1: r"(raised|raises|(?<!no )increased) the",
                -1: r"(lowered|lowers|reduced) the",
                0: r"(did not change|had no effect on|did not alter|failed to modify|does not \w+) "
                r"the (rate|likelihood)",
            }.items()
            if re.search(claim, end)
        ]
        assert stated == [sign], text
        assert ("not support" in end or "needed" in end or "required" in end) == (sign == 0), text
        signs[sign] += 1
    assert min(signs[sign] for sign in (-1, 0, 1)) > 50 and signs.total() > 400


@pytest.mark.parametrize(
    "kind, sentence, result, claim, denial",
    [
        (
            "gene",
            -1,
            r"P < 0",
            "confers susceptibility|is a risk factor|is associated with|implicate|point to",
            "not associated|no risk factor|unrelated|argue against|exclude|rule out",
        ),
        ("cell", -1, r"(rose|raised|increased) ([A-Z]|from)", "activates|activation", "inhibits|inhibition"),
        (
            "case",
            -2,
            r"rechallenge",
            "was caused by|the (probable|likely) cause",
            "was not caused|an (improbable|unlikely) cause",
        ),
    ],
)
def test_other_conclusions_follow_the_results(kind, sentence, result, claim, denial):
    signs = Counter()
    for made, _, _ in of_kind(kind):
        conclusion = made.text.split(". ")[sentence]
        sign = bool(re.search(result, made.text))
        assert (bool(re.search(claim, conclusion)), bool(re.search(denial, conclusion))) == (sign, not sign), made.text
        signs[sign] += 1
    assert min(signs[True], signs[False]) > 20


# --- Facts -------------------------------------------------------------------------------------------------------


def test_the_knowledge_base_is_sound():
    assert (len(DRUGS), len(GENES), len(DISEASES)) == (360, 240, 150)
    names = [*DRUGS, *GENES, *DISEASES, *{gene.pathway for gene in WORLD.genes}]
    assert len(set(map(str.lower, names))) == len(names)
    assert {drug.target for drug in WORLD.drugs} == set(WORLD.genes)
    assert {gene.disease for gene in WORLD.genes} == set(WORLD.diseases)
    assert all(drug.indication is drug.target.disease for drug in WORLD.drugs)
    assert knowledge_base() is WORLD


def test_texts_state_the_facts_of_the_knowledge_base():
    for kind in ORDER:
        for _, slots, values in of_kind(kind):
            drug, disease = DRUGS.get(values.get("drug", "")), DISEASES[values["disease"]]
            gene = drug.target if drug else GENES[values["gene"]]
            facts = {
                "target": gene.symbol,
                "pathway": gene.pathway,
                "tissue": gene.tissue,
                "indication": gene.disease.name,
                "outcome": disease.outcome,
                "action": drug and drug.action,
            }
            assert all(values[name] == facts[name] for name in facts.keys() & values.keys())
            effect = not any(word in slot for slot in slots for word in ("fails", "equal"))
            assert effect == (disease == gene.disease)
            if drug and kind != "cell":
                assert (values["adverse"] == drug.adverse_event) == ("case.course.chance" not in slots)
            if kind == "cell":
                assert (int(values["after"]) > int(values["before"])) == (drug.name.endswith(("terol", "glutide")))
            if kind == "trial" and effect:
                assert (int(values["p1"]) > int(values["p2"])) == disease.desirable
