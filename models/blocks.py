"""Building blocks of every layer: norms, initializers and the plain SwiGLU."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.experts import activate

Array = jax.Array


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axes, in float32."""

    epsilon: float
    param_dtype: str
    axes: int = 1
    """Number of last axes that are normalised together."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[x.ndim - self.axes :]
        scale = self.param("scale", nn.initializers.ones_init(), shape, jnp.dtype(self.param_dtype))
        x32 = x.astype(jnp.float32)
        over = tuple(range(-self.axes, 0))
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=over, keepdims=True) + self.epsilon)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
        return (normed * scale).astype(x.dtype)


def fan_in_normal(*fan_in_axes: int) -> nn.initializers.Initializer:
    """Return a normal initializer with variance 1 / (product of the sizes of the axes that are summed over)."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:  # pyright: ignore
        fan_in = 1
        for axis in fan_in_axes:
            fan_in *= shape[axis]
        return jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)

    return init


class FeedForward(nn.Module):
    """One SwiGLU for all tokens."""

    size: int
    """Width of the hidden layer."""
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype, param_dtype, hidden_size = jnp.dtype(self.dtype), jnp.dtype(self.param_dtype), x.shape[-1]
        gate_up = self.param("gate_up", fan_in_normal(0), (hidden_size, 2, self.size), param_dtype)
        down = self.param("down", fan_in_normal(0), (self.size, hidden_size), param_dtype)
        projected = jnp.einsum("btd,dcf->btcf", x, gate_up.astype(dtype))
        return jnp.einsum("btf,fd->btd", activate(projected[:, :, 0], projected[:, :, 1]), down.astype(dtype))
