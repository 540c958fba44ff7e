"""Answers by likelihood, against transformers, and against lm-evaluation-harness where that is installed."""

import huggingface_models
import jax
import numpy as np
import pytest
import questions

from biomedlm_jax import exporting, huggingface, likelihood, load, sharding, tokenizer
from biomedlm_jax.config import Config, MeshConfig
from biomedlm_jax.tasks import Classification, MultipleChoice

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS, POSITIONS = 300, 128
QUESTION = MultipleChoice("1", "Which one?", ("this", "that one"), 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Hugging Face folder with its tokenizer, as a run is exported."""
    folder = tmp_path_factory.mktemp("model")
    model = huggingface_models.make_model(
        std=0.1, vocab_size=WORDS, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4, eos_token_id=WORDS - 1
    )
    model.save_pretrained(folder / "from")
    tokenizer.export_tokenizer(huggingface_models.make_tokenizer(WORDS), folder / "from", model_max_length=POSITIONS)
    huggingface.import_model(folder / "from", folder / "run")
    exporting.export(folder / "run", folder / "hf")
    return folder / "hf"


def make_scorer(folder, mesh):
    config = Config(model=load.read_config(folder))
    mesh = sharding.make_mesh(mesh, jax.devices()[: mesh.replica * mesh.fsdp])
    params = load.load_on_mesh(folder, None, mesh)
    return likelihood.Scorer(config, mesh, params, load.load_tokenizer(folder), 8), mesh


def score(folder, pairs, mesh):
    scorer, mesh = make_scorer(folder, mesh)
    with jax.set_mesh(mesh):
        return scorer(pairs), scorer.cut


def make_pairs():
    """Prompts of real questions: some longer than the model, some answers behind nothing."""
    prompts = [likelihood.make_prompt("medmcqa", e, "texts") for e in questions.multiple_choice(8)]
    prompts += [likelihood.make_prompt("medqa", e, "letters") for e in questions.multiple_choice(4)[:2]]
    prompts += [likelihood.make_prompt("pubmedqa", e, "texts") for e in questions.classification(2)]
    prompts.append(likelihood.Prompt("", ("yes", "no", "a longer answer")))
    return [(prompt.context, f" {answer}") for prompt in prompts for answer in prompt.answers]


def test_log_likelihoods_equal_transformers_on_any_mesh(exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    encode = transformers.AutoTokenizer.from_pretrained(exported).encode
    pairs, expected, too_long = make_pairs(), [], 0
    for context, answer in pairs:
        ids, n_context = encode(context + answer), len(encode(context))
        if not context:
            ids = [model.config.eos_token_id, *ids]
            n_context = 1
        count = len(ids) - n_context
        too_long += len(ids) > POSITIONS + 1
        ids = ids[-(POSITIONS + 1) :]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        targets = ids[-count:]
        expected.append(log_probabilities[range(-count, 0), targets].sum().item())
    assert 0 < too_long < len(pairs)
    for mesh in (MeshConfig(fsdp=1), MeshConfig(replica=2, fsdp=4)):
        found, cut = score(exported, pairs, mesh)
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert cut == too_long


def test_log_likelihoods_and_prompts_equal_lm_evaluation_harness(exported):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lm_eval[hf]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.medmcqa import utils_medmcqa
    from lm_eval.tasks.medqa import preprocess_medqa
    from lm_eval.tasks.pubmedqa import preprocess_pubmedqa

    pairs = make_pairs()
    theirs = HFLM(pretrained=str(exported), device="cpu", batch_size=4, dtype="float32")
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    expected = [sums for sums, _ in theirs.loglikelihood(requests)]
    np.testing.assert_allclose(score(exported, pairs, MeshConfig(fsdp=1))[0], expected, atol=1e-3)

    for example in questions.multiple_choice(3):
        endings = {f"ending{i}": choice for i, choice in enumerate(example.choices)}
        options = dict(zip(("opa", "opb", "opc", "opd"), example.choices, strict=True))
        medqa = preprocess_medqa.doc_to_text({"sent1": example.question, **endings})
        medmcqa = utils_medmcqa.doc_to_text({"question": example.question, **options})
        assert likelihood.make_prompt("medqa", example, "letters").context == medqa
        assert likelihood.make_prompt("medmcqa", example, "letters").context == medmcqa
    contexts = ("It was.", "It is.")
    pubmedqa = preprocess_pubmedqa.doc_to_text({"CONTEXTS": list(contexts), "QUESTION": "Is it?"})
    assert likelihood.make_prompt("pubmedqa", Classification("1", contexts, "Is it?", 0), "texts").context == pubmedqa


def test_prompts():
    text = likelihood.make_prompt("medqa", QUESTION, "texts")
    assert text == likelihood.Prompt("Question: Which one?\nAnswer:", ("this", "that one"))
    letters = likelihood.make_prompt("mmlu", QUESTION, "letters")
    assert letters == likelihood.Prompt("Which one?\nA. this\nB. that one\nAnswer:", ("A", "B"))
    about = likelihood.make_prompt("bioasq", Classification("1", ("It was.", "It is."), "Is it?", 0), "texts")
    assert about == likelihood.Prompt("Abstract: It was.\nIt is.\nQuestion: Is it?\nAnswer:", ("no", "yes"))
    shown = likelihood.with_shots(text, [(text, 1), (letters, 0)])
    assert shown.answers == text.answers
    assert shown.context == (
        "Question: Which one?\nAnswer: that one\n\nWhich one?\nA. this\nB. that one\nAnswer: A\n\n"
        "Question: Which one?\nAnswer:"
    )


def test_rules():
    """Sums, by character, and without what an answer is worth by itself."""
    sums = {("q", " ab"): -4.0, ("q", " abcd"): -6.0, ("", " ab"): -1.0, ("", " abcd"): -5.0}
    found = likelihood.scores(lambda pairs: [sums[pair] for pair in pairs], [likelihood.Prompt("q", ("ab", "abcd"))])
    assert {rule: rows[0].tolist() for rule, rows in found.items()} == {
        "sum": [-4, -6],
        "length": [-2, -1.5],
        "prior": [-3, -1],
    }


def test_batches_change_nothing(exported):
    scorer, mesh = make_scorer(exported, MeshConfig(fsdp=1))
    pairs = make_pairs()
    with jax.set_mesh(mesh):
        together = scorer(pairs)
        apart = [scorer([pair])[0] for pair in pairs[::9]]
    np.testing.assert_allclose(together[::9], apart, atol=1e-4)
