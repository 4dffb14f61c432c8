"""megatron_ds: a Megatron-style training framework on DeepSpeed. Read pretrain.py first, then docs/reading_order.md."""

__version__ = "0.1.0"
