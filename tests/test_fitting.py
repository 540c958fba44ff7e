"""A batch that does not fit into a device's memory is refused before the first step, with the largest that does."""

import functools
import re
import unittest.mock

import absent_hardware
import jax
import pytest
import tiny

from biomedlm_jax import data, program, sharding, step, targets
from biomedlm_jax import train as train_lib
from biomedlm_jax.config import Config, MeshConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.planning import memory


def jit_on(mesh, config):
    state = jax.eval_shape(functools.partial(step.init_state, config))
    return step.jit_train_step(config, sharding.tree_shardings(mesh, state), sharding.batch_sharding(mesh))


def abstract(config):
    return jax.eval_shape(functools.partial(step.init_state, config)), data.abstract_batch(config)


def bytes_of(mesh, config):
    """What a step needs of a device, as its compiler says."""
    with jax.set_mesh(mesh):
        return memory.total_bytes(jit_on(mesh, config).lower(*abstract(config)).compile().memory_analysis())


def refusal(mesh, config, limit):
    with jax.set_mesh(mesh), pytest.raises(UserError) as error:
        program.Program(config, functools.partial(jit_on, mesh), limit).compile(*abstract(config))
    assert "\n" not in str(error.value)
    return str(error.value)


def small(**train) -> Config:
    """96 rows over eight devices, twelve each."""
    return tiny.replace(model={"n_positions": 64}, train={"global_batch_size": 96, **train})


@pytest.mark.parametrize(("parts", "sequences"), [(1, 12), (2, 6)])
def test_the_largest_that_fits_is_true(parts, sequences):
    mesh = sharding.make_mesh(MeshConfig())
    needs = {12 // parts: bytes_of(mesh, small(gradient_accumulation_steps=parts)) for parts in (1, 2, 3, 4, 6, 12)}
    assert needs[1] < needs[2] < needs[3] < needs[4] < needs[6]
    limit = (needs[3] + needs[4]) // 2
    message = refusal(mesh, small(gradient_accumulation_steps=parts), limit)
    assert f"{sequences} sequences a device need {needs[sequences] / 1e9:.1f} GB" in message
    assert "of the 0.0 GB that a cpu allows: the largest that fits is 3 " in message
    assert "(train.gradient_accumulation_steps 4 computes the batch in such parts)" in message
    # What it names does fit, and what does not need refusing is not refused.
    fitting = small(gradient_accumulation_steps=4)
    with jax.set_mesh(mesh):
        program.Program(fitting, functools.partial(jit_on, mesh), limit).compile(*abstract(fitting))
        program.Program(small(), functools.partial(jit_on, mesh), None).compile(*abstract(small()))


def test_what_cannot_fit_names_what_needs_less():
    mesh = sharding.make_mesh(MeshConfig())
    assert "not even 1 fits; model.remat matmuls or full, train.loss_chunk, more devices need less" in refusal(
        mesh, small(), 1
    )
    last = tiny.replace(small(gradient_accumulation_steps=12, loss_chunk=16), model={"remat": "full"})
    message = refusal(mesh, last, 1)
    assert message.startswith("1 sequence a device needs") and message.endswith(
        "not even 1 fits; more devices need less, too"
    )


class OutOfMemory:
    """A jitted step whose compiler, or whose first step, finds too little memory for more than so many rows at once."""

    def __init__(self, config, most, when):
        self.rows = config.train.global_batch_size // config.train.gradient_accumulation_steps // 8
        self.most, self.when = most, when

    def lower(self, *arguments):
        return self

    def _fail(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    def compile(self):
        if self.when == "compiling" and self.rows > self.most:
            self._fail()
        return self

    def memory_analysis(self):
        return unittest.mock.Mock(
            argument_size_in_bytes=self.rows * 10**9,
            temp_size_in_bytes=0,
            output_size_in_bytes=0,
            alias_size_in_bytes=0,
            generated_code_size_in_bytes=0,
        )

    def __call__(self, *arguments):
        self._fail()


@pytest.mark.parametrize(("limit", "allowed"), [(10**11, "the 100.0 GB that a cpu allows"), (None, "what a cpu has")])
def test_a_compiler_that_finds_too_little_memory_is_asked_for_less(limit, allowed):
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh), pytest.raises(UserError) as error:
        program.Program(small(), lambda config: OutOfMemory(config, 4, "compiling"), limit).compile(*abstract(small()))
    assert f"12 sequences a device need more than {allowed}: the largest that fits is 4 (" in str(error.value)


def test_a_first_step_that_finds_too_little_memory_says_so_in_a_line():
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh), pytest.raises(UserError) as error:
        program.Program(small(), lambda config: OutOfMemory(config, 4, "running"), 10**11)(*abstract(small()))
    assert str(error.value) == (
        "12 sequences a device need 12.0 GB of the 100.0 GB that a cpu allows, and the first step did not find them: "
        "the next smaller number is 6 (train.gradient_accumulation_steps 2 computes the batch in such parts); "
        "model.remat matmuls or full, train.loss_chunk, more devices need less, too"
    )


def test_train_refuses_before_it_computes_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "memory_limit", lambda: 1)
    monkeypatch.setattr(train_lib, "_starting_state", lambda *_: pytest.fail("weights were loaded"))
    config = tiny.run_config(tmp_path / "prepared", tmp_path / "run", train={"steps": 3})
    with pytest.raises(UserError, match="2 sequences a device need .* not even 1 fits"):
        train_lib.train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_h200_is_told_what_fits():
    """By its real compiler, for a layer of BioMedLM."""
    if reason := absent_hardware.missing("h200"):
        pytest.skip(f"compiling for h200 {reason}")
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        config = tiny.replace(Config(), model={"n_layer": 1, "attention": "reference"}, train={"global_batch_size": 4})
        mesh = sharding.make_mesh(MeshConfig(), targets.parse("h200:1x1").devices())
        limit = bytes_of(mesh, tiny.replace(config, train={"gradient_accumulation_steps": 2}))
        message = refusal(mesh, config, limit)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_disable_most_optimizations", True)
    assert re.match(r"4 sequences a device need \d\.\d GB of the \d\.\d GB that a NVIDIA H200 allows: ", message)
    assert "the largest that fits is 2 (train.gradient_accumulation_steps 2 computes" in message
