"""From text files to batches: tokenizer, Megatron's .bin/.idx corpus, sample order, blends and the loader.

Reading order: ``tokenizer``, ``sources`` and ``prepare`` write a corpus once; ``indexed``, ``samples``, ``blend`` and
``loader`` read it on every rank. Every order is a pure function of (seed, position): there is no iterator state.
"""
