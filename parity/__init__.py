"""Comparison with the published implementation; runs in an environment of its own (`make parity`)."""
