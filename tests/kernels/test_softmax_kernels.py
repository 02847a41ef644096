"""The kernels of the softmax in place, by Triton's interpreter, against torch's own on the CPU."""

import os
import subprocess
import sys

INTERPRETED = """
import torch
from megatron_helix.kernels import masked_softmax, softmax_kernels
from megatron_helix.kernels.masked_softmax import Scores, _visible
from megatron_helix.kernels.query_pieces import Sight, cut
torch.manual_seed(1)
single, half = torch.float32, torch.float16
cases = [
    (Sight(left=None, right=0), 1.0, [(4, 8)], half),
    (Sight(left=2, right=3), 3.0, [(6, 8)], single),
    (Sight(left=None, right=None), 1.0, [(0, 4)], single),
]
for sight, coefficient, runs, dtype in cases:
    allowed = {"rtol": 0, "atol": 1e-6 if dtype == single else 2**-11}
    how = Scores(sight=sight, coefficient=coefficient)
    for piece in cut(runs, 20, sight):
        scores = torch.randn(1, 1 + (dtype == half), piece.length, piece.keys).to(dtype)
        visible = _visible(piece, sight)
        expected, found, even = scores.clone(), scores.clone(), torch.zeros_like(scores)
        masked_softmax.softmax_(expected, piece, how, None, None)
        softmax_kernels.forward(found, coefficient, *visible)
        torch.testing.assert_close(found, expected, **allowed)
        grad = torch.randn(scores.shape).to(dtype)
        of_scores = grad.clone()
        masked_softmax.softmax_backward_(of_scores, expected, piece, how, plain=True)
        masked_softmax.softmax_(even, piece, how, None, None)
        grad[even == 0] = torch.nan  # what is not seen is not read
        softmax_kernels.backward(grad, expected, *visible)
        torch.testing.assert_close(grad, of_scores, **allowed)
"""


def test_by_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, check=True)
