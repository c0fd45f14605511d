"""What people read: tables, figures and the page. The numbers are made in `ptbench.analysis`.

pandas, matplotlib and seaborn are imported here and nowhere else, so a command that draws nothing
must not import this package.
"""
