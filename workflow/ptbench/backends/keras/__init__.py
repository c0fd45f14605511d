"""The contract in Keras 3, on its TensorFlow backend."""

from ptbench.backends.tensorflow import runtime as runtime  # first: Keras' import reads it
