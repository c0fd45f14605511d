"""The language model in JAX: pure functions over a dictionary of parameters, compiled by XLA.

`layers` has the recurrent layers, `heads` the output layers and their losses, `model` puts them
together and draws the parameters, `optimizer` updates them, `devices` knows the machine and every
setting, and `backend` keeps the contract. Flax and Optax are not used: with JAX's own parts each of
these is a page without them.
"""

from ptbench.backends.jax.backend import JaxBackend

__all__ = ["JaxBackend"]
