"""Hugging Face: which model families can hold a model (targets/), writing and proving an export (export.py)."""
