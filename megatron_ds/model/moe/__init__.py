"""Sparse mixture of experts: the choice of experts and its balance, the way of tokens to them and back, their work."""
