"""What people read: tables, figures and the page. `ptbench.analysis` makes the numbers.

`figures.py` and `tables.py` import matplotlib and pandas, which takes seconds; a command that draws
nothing must not import them.
"""
