"""The claims of the paper and the methods beyond it, run and told by their numbers: python -m benchmarks.results

arms.py     what is run: every arm as the overrides of its command, and its seeds
claims.py   what is claimed, and the rule of each verdict, a function of the numbers
runner.py   runs what is missing, side by side
records.py  what a finished run leaves: a line of docs/results/runs.json
pages.py    docs/RESULTS.md and the tables of docs/METHODS.md, docs/TINY.md and README.md, made of these lines

No number and no verdict is typed by hand.
"""
