"""The implementations of the operators, and the registry that chooses one of them for every call."""
