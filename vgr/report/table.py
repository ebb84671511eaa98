"""What every number of results.json is: label, unit, direction and definition."""

from __future__ import annotations

from typing import NamedTuple

from vgr.metrics import drift, features, frame_rate
from vgr.metrics.pose_conventions import KEYS

FD = f"fd_{features.NAME}"
POSE_ERRORS = ("rot_step_imputed_deg", "heading_imputed_deg")


class Metric(NamedTuple):
    """label and unit for people; better: "higher", "lower" or "" (neither); `how` and the protocol's `section`
    define the number; primary ones stand in the table.
    """

    label: str
    unit: str
    better: str
    how: str
    section: str = ""
    primary: bool = True


_SCORED = "mean over frames; the given first frame is left out; range 255"
_FLOW = "frame-to-frame optical flow, small rotations, no alignment; unreadable steps count as no motion"
_TREND = "Theil-Sen slope over windows minus the true video's; the given first frame is left out"
_OWN = "Theil-Sen slope over windows of one shot; the given first frame is left out"
_CALLS = "batch 1, one request after another, text encoding and decoding included"
_SFM = "structure from motion of keyframes; world rotation from the cameras' own, scale by least squares"
_STREAM = "ends of its pieces as they reach the host; batch 1"
_BACK = "frames of one view after the camera was elsewhere, minus a pair as far apart in time of two views"
METRICS = {
    "psnr_db": Metric("PSNR", "dB", "higher", _SCORED),
    "ssim": Metric("SSIM", "", "higher", _SCORED),
    "rot_step_imputed_deg": Metric("Rotation error", "°/frame", "lower", _FLOW),
    "heading_imputed_deg": Metric("Heading error", "°", "lower", _FLOW),
    "pose_coverage": Metric("Pose coverage", "", "higher", "share of steps the flow can read"),
    "rot_imputed_deg": Metric("Rotation error, mapped", "°", "lower", f"{_SFM}; lost frames never turned", "pose"),
    "trans_imputed": Metric("Position error", "m", "lower", f"{_SFM}; lost frames never moved", "pose"),
    "sfm_coverage": Metric("Reconstructed", "", "higher", "share of keyframes; 0 where it is refused", "pose"),
    "path_length_ratio": Metric("Way made / commanded", "", "", f"{_SFM}, before any scale", "pose", False),
    "sfm_fov_deg": Metric("Field of view", "°", "", "across, estimated where no intrinsics are given", "pose", False),
    "sfm_turn_deg_per_s": Metric("Turning", "°/s", "", _SFM, "pose", False),
    **{
        f"{name}_{key}": Metric(f"{key} as {name}", "", "higher" if "score" in key else "", f"the published {name} way",
                                "pose", False)
        for name, keys in KEYS.items() for key in keys
    },
    FD: Metric(
        "Fréchet distance, clipstats48", "", "lower",
        "features clipstats48 (no weights) of windows at 64x48, ddof 1; interval from half-samples", "frechet",
    ),
    "fvd": Metric(
        "FVD", "", "lower", "StyleGAN-V's: I3D logits of one clip a video, from the start, of true ones from a random "
        "frame; ddof 0; interval from half-samples", "fvd",
    ),
    "fd_videomae": Metric("Fréchet distance, VideoMAE", "", "lower", "as FVD, on VideoMAE's pooled features", "fvd"),
    "drift": Metric("Drift", "sd", "lower", f"mean size of five trends in sd of the true videos'. {_TREND}", "drift"),
    "time_to_failure_s": Metric(
        "Time to failure", "s", "higher", "first of two windows in a row outside the true videos' 1 to 99 % in "
        "lightness, chroma, contrast, sharpness or motion; restricted mean of Kaplan and Meier", "drift",
    ),
    "motion_level": Metric("Motion", "diag/s", "", "median optical flow in image diagonals a second", "drift"),
    "stagnation": Metric("Stagnation", "", "lower", "windows with under a tenth of the first's motion", "drift"),
    "seam_ratio": Metric("Chunk seams", "", "lower", "change from frame to frame into a chunk over elsewhere; 1: none"),
    "memory_db": Metric("Memory of places", "dB", "higher", f"PSNR of {_BACK}", "revisit"),
    "memory_ssim": Metric("Memory of places, SSIM", "", "higher", f"SSIM of {_BACK}", "revisit", False),
    "revisit_db": Metric("PSNR at the return", "dB", "higher", "of frames of one view", "revisit", False),
    "return_dropped": Metric("Returns not made", "", "lower", "share of pairs whose estimated path does not come back",
                             "revisit", False),
    "cuts": Metric("Cuts", "", "", "by colours and where they stand", "shots", False),
    "sca": Metric("Shot-cut accuracy", "", "higher", "exp(-offsets and penalties / frames), a penalty one shot long",
                  "shots"),
    **{
        f"{name}_excess_per_s": Metric(f"{name.capitalize()} trend over truth", f"{unit}/s", "", _TREND, "drift", False)
        for name, unit in drift.UNITS.items()
    },
    **{
        f"{name}_{kind}": Metric(f"{name.capitalize()}, {words}", f"{unit}{per}", "", how, "drift", False)
        for name, unit in drift.UNITS.items()
        for kind, words, per, how in (
            ("per_s", "trend", "/s", _OWN),
            ("end_minus_start", "end minus start", "", "last minus first 15 % of a shot"),
        )
    },
    "first_frame_s": Metric("First frame", "s", "lower", _CALLS, "frame_rate", False),
    "frames_per_s": Metric("Speed, end to end", "frames/s", "higher", _CALLS, "frame_rate", False),
    "steady_frames_per_s": Metric("Speed after the first piece", "frames/s", "higher", _STREAM, "frame_rate", False),
    "denoise_frames_per_s": Metric(
        "Speed, denoising only", "frames/s", "higher", "batch 1; denoising alone", "frame_rate", False
    ),
    "realtime_factor": Metric("Seconds made a second", "", "higher", _CALLS, "frame_rate", False),
    "late_share": Metric("Pieces too late to play", "", "lower", _STREAM, "frame_rate", False),
    **{
        f"chunk_p{p}_s": Metric(f"A chunk takes, {p} %", "s", "lower", _STREAM, "frame_rate", False)
        for p in frame_rate.PERCENTILES
    },
    "latency_s_per_min": Metric("Latency trend", "s/min", "", _STREAM, "frame_rate", False),
    "memory_gb_per_min": Metric("Memory trend", "GB/min", "", "of what is held, over the rollout", "frame_rate", False),
    **{
        f"memory_{name}_gb": Metric(f"Memory, {what}", "GB", "lower", f"peak, {what}", "frame_rate", False)
        for name, what in (("allocated", "tensors"), ("reserved", "torch's pool"), ("device", "whole device"),
                           ("host", "process on the host"))
    },
}  # fmt: skip
