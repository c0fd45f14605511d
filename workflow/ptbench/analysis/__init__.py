"""From cells to numbers: collecting runs, statistics, and the comparison with published numbers.

Nothing here writes a file or draws; that is `ptbench.report`.
"""
