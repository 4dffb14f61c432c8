"""Package metadata; constraints.txt holds the exact versions that are tested."""

from setuptools import find_packages, setup

setup(
    name="megatron_ds",
    version="0.1.0",
    description="A Megatron-style training framework on DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_ds", "megatron_ds.*"]),
    install_requires=[
        "torch>=2.13",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23",
        "datasets>=5.2",
        "tokenizers>=0.23",
        "wandb>=0.31",
        "numpy>=2",
        "pydantic>=2.14",
        "rich>=15",
        "tqdm>=4.70",
        "safetensors>=0.8",
        "huggingface_hub>=2.4",
        "jinja2>=3.1",
        "filelock>=4.2",
        "matplotlib>=3.11",
        "pyarrow>=26",
        "psutil>=7.2",
        "zstandard>=0.25",
    ],
    extras_require={
        # megatron-core is installed without its dependencies (Makefile): the tests read and write .bin/.idx with it.
        "dev": ["pytest>=9.2", "pytest-timeout>=2.4", "pytest-xdist>=3.8", "hypothesis>=6.170", "ruff>=0.17"],
    },
    entry_points={"console_scripts": ["megatron-ds=megatron_ds.cli.main:entry"]},
)
