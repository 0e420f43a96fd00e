"""Memory: what a forward run keeps for its gradient (docs/memory.md).

`strategies.py` has the choices, `plan.py` predicts what each takes, `planner.py` measures a network and picks one,
`tracker.py` counts the bytes of live tensors, and `profiling.py` shows what a chain really held.
"""
