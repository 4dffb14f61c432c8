"""The optimizer: parameter groups, the learning rate as a function of the step, and the global gradient norm.

Everything here is arithmetic on one process. Who holds which part of a gradient, and when parts are summed over ranks,
is the engine's business.
"""
