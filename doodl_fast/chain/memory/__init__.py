"""Memory: what a gradient needs, which plan fits into a budget, and what was really used."""
