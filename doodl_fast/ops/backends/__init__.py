"""The implementations of the operators: which ones exist on this machine, and which one serves a call."""
