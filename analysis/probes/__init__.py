"""Probes: what a network attends to, which of its channels live, what its first stage sees.

They load models and write arrays; figures read the arrays and import no torch. `python -m analysis.probes --help`.
"""
