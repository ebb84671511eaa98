"""Training the refiner: the house's training of any denoiser, on pairs and measured by refining (spec 7)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from vgr.training.validation import PairValidation, validate_pairs
from vgr.training.world_model import WorldModelTraining
from vgr.types import VideoBatch


class RefinerTraining(WorldModelTraining):
    """`WorldModelTraining` of a `Refiner`, whose averaged weights are validated on the path they are trained on.

    objective: `diffusion.objectives.refinement` with its settings, as a partial.
    """

    def validate(self, batches: Sequence[VideoBatch]) -> PairValidation:
        """The averaged weights on held-out pairs."""
        self.ema.eval()
        path = {k: p.default for k, p in inspect.signature(self.objective).parameters.items()}
        return validate_pairs(
            self.ema["model"], self.ema["text"], batches, self.validation_levels, seed=self.seed, chunk=self.chunk,
            device=self.device, **{k: path[k] for k in ("sigma_start", "reference")},
        )  # fmt: skip
