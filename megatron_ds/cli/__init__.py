"""The ``megatron-ds`` command: one file per subcommand, found through the table in ``main.py``."""
