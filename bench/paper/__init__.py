"""The comparison of the DOODL paper (arXiv 2303.13703) on the embedded pipeline: tasks, methods, a judge.

python -m bench.paper run --out OUT
python -m bench.paper report OUT
"""
