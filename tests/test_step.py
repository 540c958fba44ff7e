import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from biomedlm_jax import model as model_lib
from biomedlm_jax import sharding, step
from biomedlm_jax.config import MeshConfig


def test_accumulation_weighs_by_tokens():
    """Rows of very different lengths: the parts' means differ, and the loss must be the mean over all tokens."""
    losses = {}
    for parts in (1, 8):
        config = tiny.replace(train={"gradient_accumulation_steps": parts})
        trainer = tiny.Trainer(config, MeshConfig(fsdp=1))
        losses[parts] = [trainer(tiny.random_batch(config, index)) for index in range(4)]
    for whole, accumulated in zip(losses[1], losses[8], strict=True):
        assert accumulated["train/loss"] == pytest.approx(whole["train/loss"], abs=1e-5)
        assert accumulated["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-4)
    # An unweighted mean of the parts' means would be far off.
    batch = tiny.random_batch(tiny.CONFIG, 0)
    halves = [step.Batch(batch.tokens[start::2], batch.mask[start::2]) for start in (0, 1)]
    params = model_lib.init_params(tiny.CONFIG.model, 0)
    evaluate = jax.jit(step.eval_step, static_argnums=0)
    means = [float(np.divide(*evaluate(tiny.CONFIG, params, half))) for half in halves]
    assert abs(np.mean(means) - losses[1][0]["train/loss"]) > 1e-4


def test_metrics_are_of_the_step_taken():
    trainer = tiny.Trainer(tiny.CONFIG, MeshConfig(fsdp=1))
    params = jax.tree.map(jnp.copy, trainer.state.params)
    batch = tiny.random_batch(tiny.CONFIG, 0)
    first, second = trainer(batch), trainer(batch)
    nll, count = step.eval_step(tiny.CONFIG, params, batch)
    assert first["train/loss"] == pytest.approx(float(nll / count), rel=1e-6)
    assert first["train/learning_rate"] == 0 and second["train/learning_rate"] == pytest.approx(0.005)
    # The first step has rate 0, so the second one sees the same weights.
    assert second["train/loss"] == pytest.approx(first["train/loss"], rel=1e-6)
    assert int(trainer.state.step) == 2


def test_dropout_is_a_function_of_seed_and_step():
    config = tiny.replace(model={"resid_pdrop": 0.3, "embd_pdrop": 0.1, "attn_pdrop": 0.1})
    batch = tiny.random_batch(config, 0)
    losses = [
        [trainer(batch)["train/loss"] for _ in range(2)]
        for trainer in (
            tiny.Trainer(config, MeshConfig(fsdp=1)),
            # Masks depend neither on the mesh nor on accumulation.
            tiny.Trainer(tiny.replace(config, train={"gradient_accumulation_steps": 2}), MeshConfig(replica=2, fsdp=4)),
        )
    ]
    # Equal weights at steps 0 and 1 (the first rate is 0), other masks.
    assert abs(losses[0][0] - losses[0][1]) > 1e-4
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)


def test_a_batch_that_predicts_nothing_changes_nothing_but_by_decay():
    trainer = tiny.Trainer(tiny.CONFIG, MeshConfig(fsdp=8))
    batch = tiny.random_batch(tiny.CONFIG, 0)
    values = trainer(step.Batch(batch.tokens, jnp.zeros_like(batch.mask)))
    assert values["train/loss"] == values["train/grad_norm"] == 0
    assert np.isfinite(trainer(batch)["train/loss"])


def test_state_is_donated_whole():
    config = tiny.CONFIG
    trainer = tiny.Trainer(config, MeshConfig(fsdp=1))
    with jax.set_mesh(trainer.mesh):
        compiled = trainer.jitted_step.lower(trainer.state, tiny.random_batch(config, 0)).compile()
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(trainer.state))
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes


def test_the_settings_of_a_pod_change_numbers_by_rounding_only():
    """bfloat16, recomputation, chunked logits and accumulation on eight devices, against float32 without them."""
    plain = tiny.Trainer(tiny.CONFIG, MeshConfig(fsdp=1))
    config = tiny.replace(
        model={"compute_dtype": "bfloat16", "remat": "matmuls"},
        train={"loss_chunk": 4, "gradient_accumulation_steps": 2},
    )
    pod = tiny.Trainer(config, MeshConfig(replica=2, fsdp=4))
    for index in range(6):
        batch = tiny.random_batch(config, index)
        expected, values = plain(batch), pod(batch)
        assert values["train/loss"] == pytest.approx(expected["train/loss"], abs=0.02)
        assert values["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=0.03)
    assert {x.dtype for x in jax.tree.leaves((pod.state.params, pod.state.opt_state))} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }


def test_small_biases_shift_no_loss_in_bfloat16():
    """The sum of two bfloat16 numbers is often a tie, which biases of a first update decide if they are not rounded.

    They then lower the loss by 0.001, and in float32 by 0.0001.
    """
    sizes = {"n_embd": 256, "n_head": 4, "n_layer": 4, "n_positions": 256, "vocab_size": 4096}
    exact = tiny.replace(model=sizes | {"compute_dtype": "float32"})
    batch = tiny.random_batch(tiny.replace(exact, train={"global_batch_size": 4}), 0)
    params = model_lib.init_params(exact.model, 0)
    grads = jax.grad(lambda params: step.eval_step(exact, params, batch)[0])(params)

    def update(path, x, gradient):
        keys = [key.key for key in path]
        return x - 1.6e-6 * jnp.sign(gradient) if keys[-2:] == ["c_proj", "bias"] else x

    updated = jax.tree_util.tree_map_with_path(update, params, grads)
    change = {}
    for dtype in ("float32", "bfloat16"):
        config = tiny.replace(exact, model={"compute_dtype": dtype})
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            evaluate = step.jit_eval_step(config, mesh)
            before, after = (float(np.divide(*evaluate(params, batch))) for params in (params, updated))
        change[dtype] = after - before
    assert change["bfloat16"] == pytest.approx(change["float32"], abs=3e-4)


def reference_losses(config, params, batches):
    """The same run with transformers and PyTorch, its optimizer written out."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    c = config.model
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.n_positions,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            scale_attn_by_inverse_layer_idx=c.scale_attn_by_inverse_layer_idx,
            attn_implementation="eager",
        )
    )
    leaves = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    with torch.no_grad():
        for path, value in jax.tree_util.tree_leaves_with_path(params):
            *scopes, leaf = [key.key for key in path]
            stacked = scopes[0] == "h"
            for layer, array in enumerate(value) if stacked else [(None, value)]:
                middle = ["h", str(layer), *scopes[1:]] if stacked else scopes
                name = ".".join(["transformer", *middle, leaves[leaf]])
                model.get_parameter(name).copy_(torch.from_numpy(np.array(array)))
    parameters = list(model.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    o, losses = config.optimizer, []
    for done, batch in enumerate(batches):
        tokens = torch.from_numpy(np.array(batch.tokens)).long()
        labels = tokens.masked_fill(~torch.from_numpy(np.array(batch.mask)), -100)
        loss = model(tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, o.clip_norm)
        progress = max(0, (done - o.warmup_steps) / (config.train.steps - o.warmup_steps))
        multiplier = (
            done / o.warmup_steps
            if done < o.warmup_steps
            else (o.final_fraction + (1 - o.final_fraction) * (1 + np.cos(np.pi * progress)) / 2)
        )
        with torch.no_grad():
            for p, (m, v) in zip(parameters, moments, strict=True):
                p.mul_(1 - multiplier * o.weight_decay)
                m.lerp_(p.grad, 1 - o.beta1)
                v.mul_(o.beta2).addcmul_(p.grad, p.grad, value=1 - o.beta2)
                denominator = v.sqrt() / np.sqrt(1 - o.beta2 ** (done + 1)) + o.eps
                p.addcdiv_(m, denominator, value=-multiplier * o.learning_rate / (1 - o.beta1 ** (done + 1)))
                p.grad = None
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("inverse_layer_scale", [True, False])
def test_fifty_steps_equal_transformers_and_pytorch(inverse_layer_scale):
    config = tiny.replace(
        model={"n_layer": 3, "scale_attn_by_inverse_layer_idx": inverse_layer_scale}, optimizer={"warmup_steps": 5}
    )
    # A few batches again and again, so that there is something to learn.
    batches = [tiny.random_batch(config, index % 4) for index in range(config.train.steps)]
    trainer = tiny.Trainer(config, MeshConfig(fsdp=1))
    expected = reference_losses(config, trainer.state.params, batches)
    losses = [trainer(batch)["train/loss"] for batch in batches]
    assert losses[-1] < losses[0] - 1
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)


def test_eval_step_sums_over_tokens():
    config, batch = tiny.CONFIG, tiny.random_batch(tiny.CONFIG, 0)
    params = model_lib.init_params(config.model, 0)
    nll, count = step.eval_step(config, params, batch)
    logits = model_lib.merge(config.model, params)(batch.tokens)
    log_probabilities = jax.nn.log_softmax(logits)[:, :-1]
    chosen = jnp.take_along_axis(log_probabilities, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    assert float(count) == float(batch.mask[:, 1:].sum())
    assert float(nll) == pytest.approx(-float(jnp.where(batch.mask[:, 1:], chosen, 0).sum()), rel=1e-6)
