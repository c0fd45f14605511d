"""The language model in Keras 3, on its TensorFlow backend.

Most modules are Keras alone, for any of its backends. What Keras leaves to its backend, here
TensorFlow, is in `devices.py` (settings, replicas) and `backend.py` (the training step under
`tf.distribute`).
"""

from ptbench.backends.keras import devices  # first: it names the backend that Keras is to import
from ptbench.backends.keras.backend import KerasBackend

__all__ = ["KerasBackend", "devices"]
