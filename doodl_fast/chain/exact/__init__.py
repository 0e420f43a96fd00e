"""Exact arithmetic: x and y are integers, so that undoing a coupling gives back the same bits (docs/exact.md).

`lattice.py` turns a program into one on integers, `arithmetic.py` carries it out on tensors, `state.py` holds what a
chain goes on from, `state_file.py` is its file, and `round_trip.py` takes states through a chain.
"""
