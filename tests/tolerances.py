"""The tolerances that several test files share. All are relative, in the 2-norm.

A tolerance with a reason of its own is in its test. Those of the operators are in `ops_cases.py`.
"""

FP64 = 1e-12
"""Two ways to compute the same thing in float64. They differ in the order of their operations, so by some roundings of
1e-16 each."""

FP64_UNDONE = 1e-10
"""A chain in float64 that is undone. Undoing a step amplifies the rounding before it."""

FP32 = 1e-5
"""Two ways to compute the same thing in float32, diffusers' own being one of them in most tests."""
