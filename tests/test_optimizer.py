import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from biomedlm_jax.config import OptimizerConfig
from biomedlm_jax.optimizer import cosine_with_warmup, decoupled_adamw, make_optimizer

# Made with mosaicml 0.32.1's DecoupledAdamW on float64 tensors; its "source" says how.
GOLDEN = json.loads((Path(__file__).parent / "golden" / "decoupled_adamw.json").read_text())


def golden_schedule():
    return cosine_with_warmup(GOLDEN["learning_rate"], GOLDEN["warmup_steps"], GOLDEN["t_max"], GOLDEN["alpha_f"])


def as_arrays(tree):
    return {name: jnp.asarray(value, jnp.float64) for name, value in tree.items()}


def test_follows_composer_in_float64():
    with jax.enable_x64(True):
        optimizer = decoupled_adamw(
            golden_schedule(),
            GOLDEN["learning_rate"],
            GOLDEN["beta1"],
            GOLDEN["beta2"],
            GOLDEN["eps"],
            weight_decay=GOLDEN["weight_decay"],
        )
        params = as_arrays(GOLDEN["initial"])
        opt_state = optimizer.init(params)
        for gradients, expected in zip(GOLDEN["gradients"], GOLDEN["parameters"], strict=True):
            updates, opt_state = optimizer.update(as_arrays(gradients), opt_state, params)
            params = optax.apply_updates(params, updates)
            for name, value in expected.items():
                np.testing.assert_allclose(params[name], value, rtol=0, atol=1e-12)


def test_schedule_follows_composer_in_float64():
    with jax.enable_x64(True):
        rates = [float(golden_schedule()(jnp.asarray(step))) for step in range(GOLDEN["t_max"])]
    np.testing.assert_allclose(rates, GOLDEN["learning_rates"], rtol=0, atol=1e-12)


def test_schedule_ends_at_its_final_fraction_and_needs_no_warmup():
    schedule = cosine_with_warmup(2.0, 0, 10, 0.25)
    assert float(schedule(0)) == 2.0
    assert float(schedule(10)) == pytest.approx(0.5)
    # The card's run: float32 counts 286,102 steps exactly.
    schedule = cosine_with_warmup(1.6e-4, 100, 286_102, 0.1)
    assert float(schedule(100)) == pytest.approx(1.6e-4)
    assert float(schedule(286_102)) == pytest.approx(1.6e-5)
    with pytest.raises(ValueError, match="warmup_steps must be in"):
        cosine_with_warmup(1.0, 10, 10, 0.1)


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_clips_by_the_global_norm(clip_norm):
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=1.0, beta1=0.0, beta2=0.0, eps=1.0, weight_decay=0.0, warmup_steps=0, clip_norm=clip_norm
        ),
        total_steps=10,
    )
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradients = {"a": jnp.asarray([6.0]), "b": jnp.asarray([8.0])}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, grad_norm=jnp.float32(10))
    # With these settings Adam's update is -g / (|g| + 1), of the clipped gradient: the norm of (6, 8) is 10.
    norm = 10.0 if clip_norm else 1.0
    np.testing.assert_allclose(updates["a"], -(6 / norm) / (6 / norm + 1), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -(8 / norm) / (8 / norm + 1), rtol=1e-6)


def test_every_parameter_decays():
    optimizer = decoupled_adamw(0.5, 1.0, weight_decay=0.1)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    # No gradient, half the peak rate: half of the decay.
    jax.tree.map(lambda update: np.testing.assert_allclose(update, -0.05, rtol=1e-6), updates)
