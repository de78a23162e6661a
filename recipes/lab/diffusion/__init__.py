"""Diffusion objectives, samplers and the stateless randomness they share.

Nothing here draws from a global random state: training noise and times come from a generator the
caller passes, and the noise of a sampled image depends on ``(seed, index)`` alone.
"""

from recipes.lab.diffusion.guidance import PRECISIONS, Sampling, sample, to_uint8
from recipes.lab.diffusion.objective import DIFFUSION_PRESETS, PREDICTIONS, SAMPLERS, Diffusion
from recipes.lab.diffusion.randomness import generator_for
from recipes.lab.diffusion.recorded import MODES, Recorder

__all__ = [
    "DIFFUSION_PRESETS",
    "MODES",
    "PRECISIONS",
    "PREDICTIONS",
    "SAMPLERS",
    "Diffusion",
    "Recorder",
    "Sampling",
    "generator_for",
    "sample",
    "to_uint8",
]
