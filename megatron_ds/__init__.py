"""megatron_ds: a Megatron-style training framework on DeepSpeed. Start at ``pretrain.py``; docs/reading_order.md follows on."""

__version__ = "0.1.0"
