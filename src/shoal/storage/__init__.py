"""Runs in a store of objects: what the driver's disk holds is copied there, and brought back from there."""
