"""The language model in MXNet 1.9: Gluon's blocks, `gluon.Trainer`, one context a replica."""
