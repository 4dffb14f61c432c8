"""The arithmetic of the global gradient norm: sums of squares per weight, their root, the clipping factor.

Every weight is counted once, whatever the topology: ranks compute ``sum_of_squares`` of the parts they own, the engine
adds the parts of one weight and collects the weights by name, and ``global_norm`` combines them in an order-independent
way. Sums are float64, so that equal gradients give equal norms, however many threads or ranks shared the work. No
communication here.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ROW = 4096
CHUNK = 256 * ROW


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Sum of the squares of all elements, in float64, as a scalar tensor on the tensor's device.

    The tensor is widened in chunks of 8 MiB, never as a whole. Each row of a chunk is summed by one thread, so that the
    result does not depend on the number of threads; that of ``torch.dot`` does.
    """
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // ROW * ROW
    total = flat[whole:].double().square().sum()
    for chunk in flat[:whole].split(CHUNK):
        total += torch.linalg.vector_norm(chunk.double().view(-1, ROW), dim=1).square_().sum()
    return total


def global_norm(squares: Mapping[str, float]) -> float:
    """Euclidean norm of all gradients from the sum of squares of every weight, by logical name.

    ``math.fsum`` rounds the exact sum once, so neither the order of the weights nor their distribution over ranks
    matters. Infinity and NaN come through.
    """
    return math.sqrt(math.fsum(squares.values()))


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Factor that brings gradients of norm ``norm`` down to ``max_norm``, as in ``torch.nn.utils.clip_grad_norm_``.

    1 where nothing has to be done; ``max_norm`` 0 turns clipping off. A norm that is not finite is for the caller to
    handle first: no factor can repair such a step.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
