"""Sweeps: many runs from one description, on one machine or a cluster, each made once."""
