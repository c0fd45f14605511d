"""The language model in PyTorch."""
