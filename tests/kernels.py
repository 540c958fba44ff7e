"""What the tests of all kernels share: random arguments, and the distance from the reference in float32."""

import functools
import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from biomedlm_jax.kernels import reference
from biomedlm_jax.kernels.documents import documents
from biomedlm_jax.kernels.flash_attention import flash_attention

# Largest relative errors, ||a - b|| / ||b||.
TOLERANCES = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 2e-5}

# Of the last layer of 32 with head size 128.
SMALLEST_SCALE = 128**-0.5 / 32


class Errors(NamedTuple):
    """Relative errors of the output and of each gradient."""

    out: float
    d_q: float
    d_k: float
    d_v: float
    d_scale: float


def draw_shapes(seed, n):
    """Shapes [batch, seq, heads, head_dim]: in turn one position, few, whole blocks, and several blocks and a rest."""
    draw = random.Random(seed)
    lengths = (lambda: 1, lambda: draw.randint(2, 60), lambda: 64 * draw.randint(1, 4), lambda: draw.randint(65, 300))
    return [(draw.randint(1, 2), lengths[i % 4](), draw.randint(1, 3), (64, 128)[(i + i // 4) % 2]) for i in range(n)]


def draw_segment_ids(seed, batch, seq):
    """Documents of every length, single positions and whole rows among them; an id may come back."""
    rng = np.random.default_rng(seed)
    # How often a new document begins differs by row.
    changes = rng.random((batch, seq)) < rng.choice((0, 0.01, 0.05, 0.3), (batch, 1))
    return jnp.asarray(np.cumsum(changes, axis=1) % 3, jnp.int32)


def draw_arguments(seed, shape, dtype):
    """A packed projection and a gradient of the output, for a shape [batch, seq, heads, head_dim]."""
    batch, seq, heads, head_dim = shape
    keys = jax.random.split(jax.random.key(seed))
    qkv = jax.random.normal(keys[0], (batch, seq, 3 * heads, head_dim), dtype)
    return qkv, jax.random.normal(keys[1], shape, dtype)


# Each program runs once or twice: compiling it takes longer.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def attention_and_gradients(attention, qkv, scale, segment_ids, d_out):
    """The output, and the gradients of `qkv` and `scale`, compiled with the scale as an argument."""
    out, vjp = jax.vjp(lambda qkv, scale: attention(qkv, scale, segment_ids), qkv, jnp.asarray(scale, jnp.float32))
    return out, *vjp(d_out)


def check(backend: Any, shape, dtype, scale, segment_ids=None, interpret: Any = True, blocks: Any = None) -> Errors:
    """Asserts that the kernel gives what the reference gives, the gradients of q, k, v and scale included."""
    qkv, d_out = draw_arguments(0, shape, dtype)

    def kernel(qkv, scale, segment_ids):
        return flash_attention(qkv, scale, segment_ids, backend=backend, interpret=interpret, blocks=blocks)

    def expected(qkv, scale, segment_ids):
        return reference.attention(qkv, scale, None if segment_ids is None else documents(segment_ids))

    out, d_qkv, d_scale = attention_and_gradients(kernel, qkv, scale, segment_ids, d_out)
    exact = attention_and_gradients(expected, qkv.astype(jnp.float32), scale, segment_ids, d_out.astype(jnp.float32))
    assert (out.shape, out.dtype, d_qkv.shape, d_qkv.dtype) == (shape, qkv.dtype, qkv.shape, qkv.dtype)
    errors = _errors(qkv, scale, (out, d_qkv, d_scale), exact)
    tolerance = TOLERANCES[jnp.dtype(dtype).name]
    # Written so that a nan fails. The scale's gradient is measured against what its terms add up to without cancelling.
    assert all(error <= tolerance for error in errors[:4]) and errors.d_scale <= min(tolerance, 5e-4), errors
    return errors


def _errors(qkv, scale, results, expected):
    (out, d_qkv, d_scale), (out_exact, d_qkv_exact, d_scale_exact) = (
        [np.asarray(x, np.float64) for x in group] for group in (results, expected)
    )
    q = np.split(np.asarray(qkv, np.float64), 3, axis=2)[0]
    norm = np.linalg.norm
    d_q, d_k, d_v = np.split(d_qkv_exact, 3, axis=2)
    # Where each position sees itself alone, the gradients of q and k are 0 but for rounding. Elsewhere they are
    # larger than this.
    floor = abs(scale) * norm(d_v)
    sizes = max(norm(d_q), floor), max(norm(d_k), floor), norm(d_v)
    differences = (norm(part) for part in np.split(d_qkv - d_qkv_exact, 3, axis=2))
    return Errors(
        norm(out - out_exact) / norm(out_exact),
        *(difference / size for difference, size in zip(differences, sizes, strict=True)),
        # The sum of q * d_q / scale, whose terms cancel.
        abs((d_scale - d_scale_exact) * scale) / (norm(q) * sizes[0]),
    )
