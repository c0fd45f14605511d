"""The language model in JAX, as pure functions over a dictionary of parameters.

Flax and Optax are not used: JAX's own functions are enough, and everything stays in sight.
"""
