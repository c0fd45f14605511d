"""From cells to numbers: metrics, collected runs, statistics, and published numbers beside ours.

Nothing here writes a file or draws; `ptbench.report` does.
"""
