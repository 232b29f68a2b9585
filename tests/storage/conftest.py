"""The store that the tests of this directory share."""

from shaky_store import shaky

__all__ = ["shaky"]
