"""Checkpoints: safetensors and JSON on disk, whole or not there at all, readable under any split.

``pieces`` says which elements a stored run of values is, ``manifest`` which files make a checkpoint, ``reader`` puts
tensors together again, ``store`` writes, commits and finds. No module here knows DeepSpeed or torch.distributed.
"""
