"""Mesh and shardings."""
