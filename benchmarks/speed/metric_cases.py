"""What `metrics.py` times: each metric of ours and its peers, as calls on one input.

Both sides start from what a user has: features (N,D) in float32, uint8 frames (F,H,W,3), poses (F,4,4).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Features = NDArray[np.float32]
Frames = NDArray[np.uint8]
Side = Callable[[int], tuple[float, Array]]  # calls -> seconds they took, the values

# The peer's side of `trajectory`: reads the number of calls, writes seconds and values, a line each.
EVO = """
import copy, json, sys, time
import numpy as np
from evo.core.metrics import APE, RPE, PoseRelation, StatisticsType
from evo.core.trajectory import PosePath3D

def errors(est, ref):
    est, ref = (PosePath3D(poses_se3=list(x)) for x in (est, ref))
    scale = est.align(ref, correct_scale=True)[2]
    ape, rpe = APE(PoseRelation.translation_part), RPE(PoseRelation.translation_part)
    turn = RPE(PoseRelation.rotation_angle_deg)
    for metric in (ape, rpe, turn):
        metric.process_data((ref, est))
    rmse, mean = StatisticsType.rmse, StatisticsType.mean
    return [ape.get_statistic(rmse), rpe.get_statistic(rmse), turn.get_statistic(mean), scale]

paths = np.load(sys.argv[1])
est, ref = paths["est"], paths["ref"]
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        found = errors(est, ref)
    print(json.dumps([time.perf_counter() - start, list(map(float, found))]), flush=True)
"""


class Case(NamedTuple):
    """Name, input, the peer; both sides, and how far their values may be apart, relative to the peer's; theirs None:
    why stands in `peer`."""

    name: str
    input: str
    peer: str
    ours: Side
    theirs: Side | None
    tolerance: float


def here(work: Callable[[], ArrayLike]) -> Side:
    """A side that runs in this process."""

    def side(calls: int) -> tuple[float, Array]:
        start = time.perf_counter()
        for _ in range(calls):
            found = work()
        return time.perf_counter() - start, np.atleast_1d(np.asarray(found, dtype=np.float64))

    return side


def features(rows: int, width: int) -> tuple[Features, Features]:
    """Two sets with the decaying spectrum and the shifted mean that networks' features have."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(width, width)) / np.sqrt(width) * (1 + np.arange(width)) ** -0.25
    x, y = (rng.normal(size=(rows, width)) @ mix for _ in range(2))
    return x.astype(np.float32), (1.1 * y + 0.05).astype(np.float32)


def torchmetrics_frechet(x: Features, y: Features) -> float:
    """As torchmetrics' FID accumulates features and computes."""
    import torch
    from torchmetrics.image.fid import _compute_fid

    told = []
    for z in (torch.from_numpy(x).double(), torch.from_numpy(y).double()):
        mean = z.sum(0, keepdim=True) / len(z)
        told += [mean[0], (z.T.mm(z) - len(z) * mean.T.mm(mean)) / (len(z) - 1)]
    return float(_compute_fid(*told))


def sqrtm_frechet(x: Features, y: Features) -> float:
    """The algebra StyleGAN-V published and cd-fvd uses: moments divided by N, scipy.linalg.sqrtm of the product."""
    from scipy.linalg import sqrtm

    (mx, sx), (my, sy) = ((z.mean(0), z.T @ z / len(z) - np.outer(z.mean(0), z.mean(0)))
                          for z in (x.astype(np.float64), y.astype(np.float64)))  # fmt: skip
    root = sqrtm(sx @ sy)  # SciPy 1.18 has no `disp`; without it the root alone comes back
    return float(np.real(np.square(mx - my).sum() + np.trace(sx + sy - 2 * root)))


def frechet(sizes: Sequence[tuple[int, int]] = ((2048, 400), (512, 1408))) -> Iterator[Case]:
    """With fewer rows than features the product is singular, and the peers take roots of the rounding of its zeros:
    hence the wider tolerance there (7e-8 was seen)."""
    from vgr.metrics.fvd import frechet_distance

    for rows, width in sizes:
        x, y = features(rows, width)
        told, near = f"N={rows} d={width}", 1e-8 if rows > width else 1e-6
        yield Case("frechet", told, "torchmetrics", here(lambda x=x, y=y: frechet_distance(x, y)),
                   here(lambda x=x, y=y: torchmetrics_frechet(x, y)), near)  # fmt: skip
        yield Case("frechet", told, "cd-fvd", here(lambda x=x, y=y: frechet_distance(x, y, ddof=0)),
                   here(lambda x=x, y=y: sqrtm_frechet(x, y)), near)  # fmt: skip


def kernel(rows: int = 2048, width: int = 400, subsets: int = 5, size: int = 1000) -> Iterator[Case]:
    """torchmetrics draws its subsets by torch's generator: it is given ours, drawn on both sides."""
    import torch
    from torchmetrics.image.kid import poly_mmd

    from vgr.metrics.fvd import kernel_distance

    x, y = features(rows, width)

    def theirs() -> float:
        rng, sets = np.random.default_rng(0), [torch.from_numpy(z).double() for z in (x, y)]
        drawn = ([z[torch.from_numpy(rng.permutation(len(z)))[:size]] for z in sets] for _ in range(subsets))
        return float(np.mean([float(poly_mmd(*pair)) for pair in drawn]))

    told = f"N={rows} d={width}, {subsets} subsets of {size}"
    yield Case("kernel", told, "torchmetrics", here(lambda: kernel_distance(x, y, subsets, size)), here(theirs), 1e-9)


def films(frames: int, height: int, width: int) -> tuple[Frames, Frames]:
    """Smooth noise and the same with a little more, (F,H,W,3) each."""
    import cv2

    rng = np.random.default_rng(0)
    film = np.stack([cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3)).astype(np.float32), (0, 0), 2)
                     for _ in range(frames)])  # fmt: skip
    film = 128 + (film - 128) * 6
    return tuple(z.clip(0, 255).astype(np.uint8) for z in (film, film + rng.normal(0, 8, film.shape)))


def image(name: str, sizes: Sequence[tuple[int, int]] = ((96, 128), (480, 640)), frames: int = 16) -> Iterator[Case]:
    """SSIM or PSNR of each frame. scikit-image's borders repeat the edge, ours mirror about it: a wider tolerance."""
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    from vgr.metrics import image as ours

    for height, width in sizes:
        pair, told = films(frames, height, width), f"{frames} frames {height}x{width}"

        def torchmetrics(pair: tuple[Frames, ...] = pair) -> Array:
            x, y = (torch.from_numpy(z).permute(0, 3, 1, 2).float() for z in pair)
            if name == "ssim":
                return structural_similarity_index_measure(x, y, data_range=255.0, reduction="none").numpy()
            return peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3)).numpy()

        def skimage(pair: tuple[Frames, ...] = pair) -> Array:
            from skimage.metrics import structural_similarity

            words = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
            whole = (structural_similarity(a, b, channel_axis=-1, full=True, **words)[1] for a, b in zip(*pair))
            return np.array([z.mean() for z in whole])  # its own mean leaves the border out

        mine = here(lambda pair=pair: getattr(ours, name)(*pair))
        yield Case(name, told, "torchmetrics", mine, here(torchmetrics), 1e-4)
        if name == "ssim":
            there = find_spec("skimage") is not None
            words = "scikit-image" if there else "scikit-image (not installed)"
            yield Case(name, told, words, mine, here(skimage) if there else None, 1e-3)


@contextmanager
def evo_process(est: Array, ref: Array) -> Iterator[Side]:
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "paths.npz", est=est, ref=ref)
        words = [sys.executable, "-c", EVO, str(Path(folder) / "paths.npz")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(words, env=os.environ | {"HOME": folder, "MPLBACKEND": "Agg"}, **pipes) as child:

            def side(calls: int) -> tuple[float, Array]:
                print(calls, file=child.stdin, flush=True)
                spent, values = json.loads(child.stdout.readline())
                return spent, np.array(values)

            yield side


def trajectory(poses: int = 500) -> Iterator[Case]:
    """ATE, RPE of translation and rotation, and the scale, after Umeyama's alignment."""
    from scipy.spatial.transform import Rotation

    from vgr.metrics.camera_pose import trajectory_errors

    rng, s = np.random.default_rng(0), np.linspace(0, 2 * np.pi, poses)
    ref = np.tile(np.eye(4), (poses, 1, 1))
    ref[:, :3, :3] = Rotation.from_euler("yxz", np.stack([s, np.sin(s) / 5, np.cos(s) / 9], 1)).as_matrix()
    ref[:, :3, 3] = np.stack([3 * np.cos(s), np.sin(2 * s), 4 * np.sin(s)], 1)
    est = ref.copy()
    est[:, :3, :3] = ref[:, :3, :3] @ Rotation.from_rotvec(rng.normal(0, 0.01, (poses, 3))).as_matrix()
    est[:, :3, 3] = (ref[:, :3, 3] + rng.normal(0, 0.02, (poses, 3))) / 3 + 1
    keys = ("ate_rmse", "rpe_trans_rmse", "rpe_rot_mean_deg", "scale")

    def mine() -> list[float]:
        found = trajectory_errors(est, ref)
        return [found[key] for key in keys]

    if find_spec("evo") is None:
        yield Case("trajectory", f"{poses} poses", "evo (not installed)", here(mine), None, 1e-6)
        return
    with evo_process(est, ref) as evo:
        yield Case("trajectory", f"{poses} poses", "evo", here(mine), evo, 1e-6)


def theil_sen(windows: Sequence[int] = (60, 600)) -> Iterator[Case]:
    """The slopes of all statistics of a video; a statistic has one value a window, so that windows cost little."""
    from scipy.stats import theilslopes

    from vgr.metrics import drift

    rng = np.random.default_rng(0)
    for count in windows:
        times = np.arange(count) + 0.5
        series = {name: (times, rng.normal(size=count) + 0.01 * times) for name in drift.UNITS}

        def mine(series: drift.Series = series, count: int = count) -> list[float]:
            with mock.patch.object(drift, "frame_statistics", lambda *_: (series, np.zeros(count - 1))):
                return list(drift.measure_drift((), 1.0).slope.values())

        def theirs(series: drift.Series = series) -> list[float]:
            return [theilslopes(values, times)[0] for times, values in series.values()]

        yield Case("theil_sen", f"{len(series)} statistics, {count} windows", "scipy", here(mine), here(theirs), 1e-9)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "frechet": frechet, "kernel": kernel, "ssim": lambda: image("ssim"), "psnr": lambda: image("psnr"),
    "trajectory": trajectory, "theil_sen": theil_sen,
}  # fmt: skip
