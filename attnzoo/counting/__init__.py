"""Multiply-accumulates of a layer or a model: closed form, measured, and as the paper counted.

Three ways, which must agree to the last multiply-accumulate:

- the closed forms ``macs_parts(grid)`` that mechanisms and backbones state;
- ``measure_macs``: torch's ``FlopCounterMode`` on the meta device, where shapes flow but no
  numbers, so that any resolution costs neither time nor memory;
- ``fvcore_macs``: fvcore's trace of a run on CPU.

``count_macs`` gives the closed form, checks it against the measurement and refuses it if they
differ; a mechanism without closed form is measured, and the result says so. Element-wise work,
norms, softmax and biases count 0. A linear scan counts as its recurrence, whatever the chunkwise
form that runs it adds, and ``impl="reference"``, a specification to test against, as "auto".
"""

from attnzoo.counting.macs import Convention, count_macs
from attnzoo.counting.measure import measure_macs
from attnzoo.counting.paper import FRAME_RULES, PAPER_RULES, PaperRule
from attnzoo.counting.result import Grid, Macs, Parts
from attnzoo.counting.traced import fvcore_macs

__all__ = [
    "FRAME_RULES",
    "PAPER_RULES",
    "Convention",
    "Grid",
    "Macs",
    "PaperRule",
    "Parts",
    "count_macs",
    "fvcore_macs",
    "measure_macs",
]
