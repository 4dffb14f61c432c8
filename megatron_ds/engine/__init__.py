"""The plug into DeepSpeed: engines that run our order tables and losses on its optimizers and gradient reduction."""
