"""The code that trained the embedded pipeline: `python -m doodl_fast.shapes.train`.

Nothing that uses the pipeline imports this package.
"""
