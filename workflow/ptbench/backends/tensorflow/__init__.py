"""The contract in TensorFlow: a `tf.Module`, compiled steps, and `tf.distribute`.

- `devices`: settings of the process, and data parallelism
- `layers`: recurrent layers, by every kernel and implementation
- `heads`: plain and mixed softmax, and their losses
- `model`: the language model made of them, its dropout and its initial draw
- `optimizer`: clipping and update rules
- `backend`: the steps that the training loop calls
"""

from ptbench.backends.tensorflow import devices  # first: what it sets is read by the import
from ptbench.backends.tensorflow.backend import TensorFlowBackend

__all__ = ["TensorFlowBackend", "devices"]
