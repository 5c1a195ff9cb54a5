"""Adapters to other libraries, each to be imported by its own name."""
