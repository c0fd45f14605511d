"""The contract in TensorFlow: a `tf.Module`, compiled steps, and `tf.distribute`."""

from ptbench.backends.tensorflow import runtime as runtime  # first: TensorFlow's import reads it
