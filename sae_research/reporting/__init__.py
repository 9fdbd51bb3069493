"""From result folders to figures, tables and the report. Nothing here imports torch or a benchmark.

`metrics` is the one table of what is measured; `extract` and `merge` turn result files into small JSON; `run`
reads that back as rows; `figures`, `plot_data`, `tables` and `report` show it.
"""
