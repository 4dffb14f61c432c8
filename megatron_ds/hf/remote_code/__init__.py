"""Modeling code that travels with an export: copied byte for byte into the directory, imported from here by ourselves.

The files follow transformers' rules for remote code (flat, relative imports among themselves), not this package's.
"""
