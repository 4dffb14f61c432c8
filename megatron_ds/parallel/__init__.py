"""Topology, process groups, collectives and the layers that use them; the only package that calls torch.distributed."""
