"""Signs of a student's health while its losses say little (causal video, spec 12): a ratio of 1 is sound."""

from __future__ import annotations

from torch import Tensor


def samples(sample: Tensor, data: Tensor) -> dict[str, Tensor]:
    """Movement between frames and spread of samples (B,C,T,H,W) over those of the data: 0 is a still or grey video."""
    motions = [x.diff(dim=2).abs().mean() for x in (sample, data)]
    return {"train/motion_ratio": _ratio(*motions), "train/std_ratio": _ratio(sample.std(), data.std())}


def scores(sample: Tensor, fake: Tensor, real: Tensor, chunk_T: Tensor) -> dict[str, Tensor]:
    """How far the critic stands from the teacher, and what grows from the first chunk made to the last.

    fake, real: the scores' clean estimates; chunk_T: the chunk of each frame, -1 for those that were not made.
    critic_gap: mean |fake - real| over mean |sample - real|, the step that samples are asked to take. Last over first
    chunk: that step (dmd_drift), the spread of each channel (std_drift: above 1 colours saturate, below they fade)
    and the difference between neighbours in space (sharpness_drift).
    """
    made = chunk_T >= 0
    parts = [chunk_T == chunk for chunk in (chunk_T[made][-1], chunk_T[made][0])]
    steps_BT, reach_BT = ((x - real).abs().mean((1, 3, 4)) for x in (fake, sample))
    step = [steps_BT[:, part].mean(1) for part in parts]
    spread = [sample[:, :, part].std((2, 3, 4)).mean(1) for part in parts]
    sharpness = [sum(sample[:, :, part].diff(dim=d).abs().mean((1, 2, 3, 4)) for d in (3, 4)) for part in parts]
    drifts = {"train/dmd_drift": step, "train/std_drift": spread, "train/sharpness_drift": sharpness}
    gap = _ratio(steps_BT[:, made].mean(1), reach_BT[:, made].mean(1))
    return {"train/critic_gap": gap, **{name: _ratio(*pair) for name, pair in drifts.items()}}


def _ratio(own_B: Tensor, reference_B: Tensor) -> Tensor:
    return (own_B / reference_B.clamp_min(1e-6)).mean()
