"""The language model in MXNet 1.9 Gluon: hybrid blocks, `gluon.Trainer` and one context a replica.

`layers`, `heads` and `model` say what is computed, `optimizer` and `devices` how, and `backend`
keeps the contract. What a backend must do is in `contract.py`; the model's definition, against
which this is tested, is `numpy_oracle.py`.
"""

from ptbench.backends.mxnet.backend import MXNetBackend as MXNetBackend
