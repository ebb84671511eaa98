"""pycolmap's part of structure from motion: features, matches and maps of one shot's frames (specs/benchmarks 4.3).

All in one folder: images, database.db and models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vgr.geometry import features
from vgr.geometry.conventions import Array
from vgr.geometry.matches import Pairs, contradicted

if TYPE_CHECKING:
    import pycolmap

OVERLAP = 5
ALONE = threading.Lock()  # the OpenBLAS within pycolmap 4.2.1 is not made for two threads, whoever starts them
_MIN_MATCHES = 15
_LOSS_PX, _LEFT_IN_PX, _LEAST_ANGLE_DEG = 0.2, 1.0, 0.5  # of the last adjustment, see `_refined`


def match_frames(folder: Path, frames: NDArray[np.uint8], k: Array | None, seed: int) -> Pairs:
    """Features and their verified matches, in `folder`/database.db, and the matches by pairs of frames."""
    import cv2
    import pycolmap

    pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value
    pycolmap.set_random_seed(seed)
    images, database = folder / "images", folder / "database.db"
    images.mkdir()
    for i, frame in enumerate(frames):
        cv2.imwrite(str(images / f"{i:06d}.png"), frame[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    reader = pycolmap.ImageReaderOptions()
    reader.camera_model = "SIMPLE_PINHOLE" if k is None else "PINHOLE"
    if k is not None:
        reader.camera_params = ",".join(f"{v:.17g}" for v in k * np.tile(frames.shape[2:0:-1], 2))
    pycolmap.Database.open(database).close()
    pycolmap.import_images(database, images, camera_mode=pycolmap.CameraMode.SINGLE, options=reader)
    gray = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
    found, flow = [features.detect(x) for x in gray], features.flows(gray)
    with pycolmap.Database.open(database) as known, (folder / "pairs.txt").open("w") as pairs:
        image_of = {int(Path(image.name).stem): image.image_id for image in known.read_all_images()}
        for i, own in enumerate(found):
            known.write_keypoints(image_of[i], own.points.astype(np.float32))
        for i, own in enumerate(found):
            led = own.points
            for j in range(i + 1, min(i + 1 + OVERLAP, len(frames))):
                led = features.follow(led, flow[j - 1])
                both = features.match(own, found[j], led, features.NEAR * max(frames.shape[1:3]))
                known.write_matches(image_of[i], image_of[j], both.astype(np.uint32))
                pairs.write(f"{i:06d}.png {j:06d}.png\n")
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed, verification.ransac.max_error = seed, 2.0
    with ALONE:
        pycolmap.verify_matches(database, folder / "pairs.txt", verification)
    with pycolmap.Database.open(database) as known:
        index, matches = {image: i for i, image in image_of.items()}, {}
        for pair, geometry in zip(*known.read_two_view_geometries()):
            a, b = (index[image] for image in pycolmap.pair_id_to_image_pair(pair))
            if len(geometry.inlier_matches) >= _MIN_MATCHES:
                matches[min(a, b), max(a, b)] = geometry.inlier_matches[:, :: 1 if a < b else -1].astype(np.int64)
        for a, b in contradicted(matches):
            known.delete_two_view_geometry(image_of[a], image_of[b])
            del matches[a, b]
    points = [x.points for x in found]
    return {(a, b): (points[a][both[:, 0]], points[b][both[:, 1]]) for (a, b), both in matches.items()}


def map_frames(
    folder: Path, mapper: str, overlap: int, refine: bool, seed: int, insist: bool
) -> pycolmap.Reconstruction | None:
    """The largest model of the matches in the folder's database, of frames at most `overlap` apart: the others are gone
    from it afterwards. By one thread: with two, equal runs differ."""
    import pycolmap

    if overlap < OVERLAP:
        with pycolmap.Database.open(folder / "database.db") as known:
            frame = {image.image_id: int(Path(image.name).stem) for image in known.read_all_images()}
            for pair in known.read_two_view_geometries()[0]:
                a, b = pycolmap.pair_id_to_image_pair(pair)
                if abs(frame[a] - frame[b]) > overlap:
                    known.delete_two_view_geometry(a, b)
    if mapper == "incremental":
        options = pycolmap.IncrementalPipelineOptions()
        options.extract_colors = False
        options.ba_refine_focal_length = options.mapper.abs_pose_refine_focal_length = refine
        options.mapper.num_threads, options.mapper.random_seed = 1, seed
        options.triangulation.random_seed = seed
        run: Callable[..., dict[int, Any]] = pycolmap.incremental_mapping
    else:
        if refine:
            pycolmap.calibrate_view_graph(folder / "database.db")
        options = pycolmap.GlobalPipelineOptions()
        options.mapper.bundle_adjustment.refine_focal_length = refine
        options.mapper.num_threads, options.mapper.random_seed = 1, seed
        run = pycolmap.global_mapping
    options.num_threads, options.random_seed = 1, seed
    models = run(folder / "database.db", folder / "images", folder / "models", options)
    # A walk straight ahead, or a short one: COLMAP trusts no such pair of frames to start from.
    if not models and insist and mapper == "incremental":
        options.mapper.init_min_tri_angle, options.mapper.init_max_forward_motion = 2.0, 1.0
        models = run(folder / "database.db", folder / "images", folder / "models", options)
    best = max(models.values(), key=lambda model: model.num_reg_images(), default=None)
    return None if best is None else _refined(best, refine)


def _refined(model: pycolmap.Reconstruction, refine: bool) -> pycolmap.Reconstruction | None:
    """All cameras and points adjusted once more, twice, by a loss that soon stops caring.

    The mappers leave observations in that are up to four pixels off, and things that move or go with the eye (a sky
    that is a picture) are a pixel or two off in every frame. Without them most walks' rotations are half as far off.
    """
    import pycolmap

    options = pycolmap.BundleAdjustmentOptions(print_summary=False, refine_focal_length=refine)
    options.ceres.loss_function_type, options.ceres.loss_function_scale = pycolmap.LossFunctionType.CAUCHY, _LOSS_PX
    options.ceres.solver_options.num_threads = 1
    config = pycolmap.BundleAdjustmentConfig()
    config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    for image in model.reg_image_ids():
        config.add_image(image)
    for _ in range(2):
        pycolmap.create_default_bundle_adjuster(options, config, model).solve()
        pycolmap.ObservationManager(model).filter_all_points3D(_LEFT_IN_PX, _LEAST_ANGLE_DEG)
        if not model.num_points3D():
            return None
    return model
