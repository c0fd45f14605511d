"""ptbench: one language model in five deep-learning frameworks, trained alike and compared.

The package holds everything the workflow's rules call. Frameworks are imported only by their own
file under `ptbench.backends`; importing `ptbench` itself imports nothing but the standard library.
"""

__version__ = "0.2.0.dev0"
