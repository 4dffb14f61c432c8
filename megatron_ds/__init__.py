"""megatron_ds: a Megatron-style training framework on DeepSpeed. Start at ``pretrain.py``, then docs/reading_order.md."""

__version__ = "0.1.0"
