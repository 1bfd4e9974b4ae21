"""Probes: where a network looks, which of its channels are alive, and what its first stage shows.

A probe loads a model and writes arrays beside its record. Figures read the arrays without torch.
"""
