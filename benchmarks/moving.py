"""What becomes of a warp, and of the video made by it, where things move on their own: curves over the moving share.

    python -m benchmarks.moving --plot runs/moving.png
    python -m benchmarks.moving --depth sparse --out benchmarks/results/moving_sparse.json
    python -m benchmarks.moving --model runs/warp_adapter/<run>/seed1 --plot runs/moving.png --sheet runs/moving_sheets

Scenes of `benchmarks.moving_scenes`, procedural and of an engine, 17 true frames and 16 more; the arms are those of
`WarpEvidence`: what moves is warped as if it stood ("keep", the published method), left out ("drop") or taken along its
way ("carry"). Differences of the last two to keep are paired over scenes.

Of the warp, with depth exact or, by --depth sparse, spread from 400 points of what stands, 1 % off: how much of the
picture it shows, PSNR there, what share of it is within 16 levels, that share of the whole picture, and how far from
the truth things are at the chunk's end; the moving mask of the last true frame, its overlap with the true one (without
things: its share, all false).

With --model, a run of an adapter or of a base alone: the chunk made behind the 17 true frames, by the arms and without
a warp, with one noise. PSNR of what stands and was in sight, of what moves, of both; how far the camera is from the
true one, by direct alignment of what stands with the last true frame (`benchmarks.alignment`); and how many pixels
off the truth things are, where the made frame is most like them, sought within 32 pixels. The true video through
the codec is the ceiling, its last true frame held the floor.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import correlate

from benchmarks.alignment import pose_errors, track
from benchmarks.moving_scenes import CHUNK, FRAMES, KINDS, LAST, PAST, SIZE_HW, Shot, grades, standing
from vgr.bench import environment
from vgr.command import tracked
from vgr.data.files import atomic, write_json
from vgr.diffusion.pyramid import Streamed
from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import FrameNoise, frame_noise
from vgr.generator import Generator
from vgr.geometry.depth import densify
from vgr.geometry.moving import Moving, carry, moving_mask, own_motion
from vgr.geometry.warp import Keyframes, Warped, warp
from vgr.metrics.statistics import mean_interval, paired
from vgr.models.warp_adapter import FROM_TIME, MOVING, WarpEvidence, where_shown, with_evidence
from vgr.report import media
from vgr.seeding import derive_seed, numpy_generator
from vgr.training.conditioning import conditioning
from vgr.types import Denoiser

SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5)
LOOK_BACK = 9  # frames in which `WarpEvidence` seeks what moves
RIGHT, POINTS, OFF = 16, 80, 0.01  # levels; sparse points of each fourth frame, and their error
REACH, LEAST = 32, 30  # pixels in which a thing is sought; of it that have to be in sight
COLOURS = {"keep": "tab:red", "drop": "tab:blue", "carry": "tab:green", "mask": "tab:blue", "no warp": "tab:gray",
           "true, through the codec": "black", "last frame held": "tab:orange"}  # fmt: skip
NO_WARP, CEILING, FLOOR = "no warp", "true, through the codec", "last frame held"
WARP = {"shown": "share shown", "psnr_shown_db": "PSNR where shown, dB", "right_of_shown": "right of what is shown",
        "right_of_all": "shown and right, of all", "place_px": "things off at the end, px"}  # fmt: skip
MODEL = {"psnr_still_db": "PSNR, standing and in sight, dB", "psnr_moving_db": "PSNR, moving, dB",
         "psnr_seen_db": "PSNR, both, dB", "align_rot_deg": "camera off, degrees", "align_trans_m": "camera off, m",
         "motion_px": "things off, px"}  # fmt: skip
Frames, Mask, Row = NDArray[np.uint8], NDArray[np.bool_], dict[str, Any]


def psnr(made: Frames, true: Frames, where: Mask) -> float:
    square = ((made.astype(np.float64) - true) ** 2).mean(-1)[where]
    return float(10 * np.log10(255**2 / max(square.mean(), 1e-9))) if square.size else float("nan")


def sparse_depth(shot: Shot, seed: int) -> NDArray[np.float32]:
    """(PAST,H,W) spread from points of what stands, as structure from motion would leave them."""
    rng, points = numpy_generator(seed, "sparse points"), []
    for f in range(0, PAST, 4):
        y, x = np.nonzero(shot.which[f] == 0)
        at = rng.permutation(len(y))[:POINTS]
        place = (np.stack([x[at], y[at]], axis=1) + 0.5) / SIZE_HW[::-1]
        ray = np.concatenate([(place - shot.k[2:]) / shot.k[:2], np.ones((len(at), 1))], axis=1)
        z = shot.depth[f][y[at], x[at]] * np.exp(OFF * rng.normal(size=len(at)))
        points.append((z[:, None] * ray) @ shot.c2w[f, :3, :3].T + shot.c2w[f, :3, 3])
    return densify(np.concatenate(points), shot.c2w[:PAST], shot.k, SIZE_HW)


def keyframe(shot: Shot, depth_HW: NDArray[np.float32]) -> Keyframes:
    """The last true frame with that depth."""
    image, cameras = torch.from_numpy(shot.frames[LAST]).permute(2, 0, 1)[None].float(), shot.cameras()
    at = slice(LAST, PAST)
    return Keyframes(image, torch.from_numpy(depth_HW)[None], cameras.intrinsics[0, at], cameras.c2w[0, at])


def sought(shot: Shot, depth: NDArray[np.float32]) -> tuple[Mask, list[Moving]]:
    """What moves in the last true frame, (H,W), and the things it is, as `WarpEvidence` finds them."""
    past, cameras = slice(PAST - LOOK_BACK, PAST), shot.cameras()
    c2w, k = (x[0, past].double().numpy() for x in (cameras.c2w, cameras.intrinsics))
    seen = shot.frames[past], depth[past], c2w, k
    mask = moving_mask(*seen)[-1]
    return mask, own_motion(*seen, mask)


def drawn(shot: Shot, depth_HW: NDArray[np.float32], mask: Mask, things: list[Moving], arm: str) -> Warped:
    """The chunk's warp from the last true frame, levels of 255, as `WarpEvidence` draws it."""
    cameras = shot.cameras()
    way = cameras.c2w[0, PAST:], cameras.intrinsics[0, PAST:]
    if arm == "carry" and things:
        return carry(keyframe(shot, depth_HW), things, *way, torch.arange(1, CHUNK + 1))
    still = np.where(mask, 0, depth_HW).astype(np.float32)
    return warp(keyframe(shot, still if arm == "drop" and still.any() else depth_HW), *way)


def judge_warp(found: Warped, shot: Shot) -> dict[str, float]:
    image, seen = found.images.round().byte().permute(0, 2, 3, 1).numpy(), found.visible.numpy()
    right = seen & (np.abs(image.astype(int) - shot.frames[PAST:]).max(-1) <= RIGHT)
    return {
        "shown": float(seen.mean()),
        "psnr_shown_db": psnr(image, shot.frames[PAST:], seen),
        "right_of_shown": float(right.sum() / max(seen.sum(), 1)),
        "right_of_all": float(right.mean()),
    }


def misplaced(shot: Shot, depth_HW: NDArray[np.float32], things: list[Moving]) -> float:
    """Pixels from where the true things' middles are in the last frame to where what was found of them takes them; at
    the most the picture's diagonal, as for what has come behind the camera."""
    off = []
    for i, where in enumerate(shot.where.swapaxes(0, 1), 1):
        mine = [int((thing.mask & (shot.which[LAST] == i)).sum()) for thing in things]
        found = things[int(np.argmax(mine))].velocity if any(mine) else np.zeros(3)
        far = np.median((depth_HW / shot.depth[LAST])[shot.which[LAST] == i])  # it is drawn as if it were so far
        at = shot.c2w[LAST, :3, 3] + far * (where[LAST] - shot.c2w[LAST, :3, 3])
        guess, true = shot.pixels(np.stack([at + CHUNK * found, where[-1]]), FRAMES - 1)
        off.append(np.fmin(np.linalg.norm(guess - true), np.hypot(*SIZE_HW)))
    return float(np.mean(off)) if off else float("nan")


def of_warp(shot: Shot, depth: NDArray[np.float32]) -> Row:
    mask, things = sought(shot, depth)
    true = shot.which[LAST] > 0
    row = {arm: judge_warp(drawn(shot, depth[LAST], mask, things, arm), shot) for arm in MOVING}
    for arm, own in (("keep", []), ("carry", things)):
        row[arm]["place_px"] = misplaced(shot, depth[LAST], own)
    iou = float((mask & true).sum() / (mask | true).sum()) if true.any() else float("nan")
    return row | {"mask": {"iou": iou, "share": float(mask.mean())}}


class Model:
    """A base, or an adapter on one, that goes on behind a shot's true past."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.base = generator.model if generator.frozen is None else generator.frozen
        made, method = (generator.chunk or 0) * generator.stride, generator.sampling["method"]
        if method not in ("pyramid", "stream") or made != CHUNK or generator.size_hw != SIZE_HW:
            raise ValueError(
                f"--model {generator.name}: {generator.size_hw} by method {method}, {made} frames a chunk; "
                f"scenes are {SIZE_HW}, for a model that streams chunks of {CHUNK}"
            )

    def _pixels(self, video: torch.Tensor) -> Frames:
        return video[0].clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()

    def _denoiser(self, noise: FrameNoise) -> Denoiser:
        one = self.generator
        if one.sampling["method"] == "pyramid":
            steps = (one.sampling["steps"],) * one.model.stages
            shown = (one.sampling.get("staged") or {}).get("shown", 1)  # as it was trained
            return Streamed(self.base, noise, steps, coarse=one.model, shown=shown)
        return with_evidence(where_shown(one.model, self.base), from_time=one.sampling.get("from_time", FROM_TIME))

    @torch.no_grad()
    def made(self, shot: Shot, depth: NDArray[np.float32], seed: int) -> dict[str, Frames]:
        """By arm, of the last true frame through the codec and the chunk: (1+CHUNK,H,W,3)."""
        one, device = self.generator, self.generator.device
        codec, past = one.codec, one.codec.latent_frames(PAST)
        true = codec.encode(torch.from_numpy(shot.frames).permute(3, 0, 1, 2)[None].float().to(device) / 127.5 - 1)
        back = self._pixels(codec.decode(true))
        found = {CEILING: back[LAST:], FLOOR: back[LAST:PAST].repeat(1 + CHUNK, 0)}
        cond = conditioning(one.text, ((shot.caption,),), shot.cameras(), torch.zeros(1, true.shape[2]).long(),
                            one.stride, one.chunk).to(device)  # fmt: skip
        noise = frame_noise([seed], (codec.channels, *true.shape[3:]), device)
        denoiser, given = self._denoiser(noise), true[:, :, :past]
        _, state = denoiser(given, torch.zeros(1, past, device=device), cond.frames(0, past), denoiser.new_state(),
                            commit=True)  # fmt: skip
        for arm in (NO_WARP, *MOVING):
            part, decode = cond.frames(past, true.shape[2]), codec.stream()
            if arm != NO_WARP:
                evidence = WarpEvidence(shot.cameras(), lambda _, frame: torch.from_numpy(depth[frame]), codec,
                                        seed=seed, rescale=False, moving=arm, **one.evidence)  # fmt: skip
                history = evidence(part, torch.from_numpy(shot.frames[:PAST]))
                part = dataclasses.replace(part, history=history).to(device)
            latents, _ = next(stream(denoiser, state, part, one.sigmas, noise))
            first = self._pixels(decode(given))[-1:]
            found[arm] = np.concatenate([first, self._pixels(decode(latents))])
        return found


def in_sight(shot: Shot) -> Mask:
    """(CHUNK,H,W): what stands still and was in sight in the last true frame."""
    still = np.where(shot.which[LAST] > 0, 0, shot.depth[LAST]).astype(np.float32)
    cameras = shot.cameras()
    seen = warp(keyframe(shot, still), cameras.c2w[0, PAST:], cameras.intrinsics[0, PAST:]).visible.numpy()
    return seen & (shot.which[PAST:] == 0)


def astray(made_HW3: Frames, true_HW3: Frames, thing: Mask) -> float:
    """How many pixels beside its true place a made picture is most like a thing, at the most REACH to each side."""
    padded = [(REACH, REACH)] * 2
    weight, image = np.pad(np.ones(thing.shape), padded), np.pad(made_HW3 / 255.0, [*padded, (0, 0)])
    mask, true = thing.astype(float), true_HW3 / 255.0 * thing[..., None]

    def slid(image: NDArray[np.float64], over: NDArray[np.float64]) -> NDArray[np.float64]:
        return correlate(image, over, "valid", "fft")

    covered = slid(weight, mask)
    apart = slid((image**2).sum(-1), mask) + slid(weight, (true**2).sum(-1))
    apart -= 2 * sum(slid(image[..., c], true[..., c]) for c in range(3))
    apart = np.where(covered >= 0.5 * mask.sum(), apart / np.maximum(covered, 1e-6), np.inf)
    place = np.array(np.unravel_index(apart.argmin(), apart.shape)) - REACH
    return float(np.linalg.norm(place))


def of_video(made: Frames, shot: Shot, seen: Mask, relit: bool = False) -> dict[str, float]:
    """MODEL of the last true frame and what was made behind it; relit: light falls with the way, as an engine's."""
    chunk, true, moving = made[1:], shot.frames[PAST:], shot.which[PAST:] > 0
    off = [
        astray(chunk[f], true[f], shot.which[PAST + f] == i)
        for f, i in itertools.product(range(7, CHUNK, 8), range(1, 1 + shot.where.shape[1]))
        if (shot.which[PAST + f] == i).sum() >= LEAST
    ]
    at = [LAST, *range(PAST + 3, FRAMES, 4)]
    pictures, moves = np.stack([made[f - LAST] for f in at]), shot.which[LAST] > 0
    pictures[0] = shot.frames[LAST]
    poses = track(pictures, shot.depth[LAST], shot.k, moves, told_F44=shot.c2w[at], relit=relit)
    return {
        "psnr_still_db": psnr(chunk, true, seen),
        "psnr_moving_db": psnr(chunk, true, moving),
        "psnr_seen_db": psnr(chunk, true, seen | moving),
        **pose_errors(poses, shot.c2w[at]),
        "motion_px": float(np.mean(off)) if off else float("nan"),
    }


def told(rows: list[Row], part: str) -> Row:
    """By arm and metric: the mean over scenes, and of drop and carry the paired difference to keep, with intervals."""
    found: Row = {}
    for arm in rows[0][part]:
        found[arm] = {}
        for name in rows[0][part][arm]:
            values = np.array([row[part][arm][name] for row in rows])
            if not np.isfinite(values).any():
                continue
            found[arm][name] = clean(mean_interval(values)._asdict())
            if arm in ("drop", "carry") and name in rows[0][part]["keep"]:
                difference, p, _ = paired(values, np.array([row[part]["keep"][name] for row in rows]))
                found[arm][name] |= {"difference": clean(difference._asdict()), "p": clean(p)}
    return found


def clean(value: Any) -> Any:
    """Without NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def plot(curves: dict[str, list[Row]], path: Path) -> None:
    """A row a metric: of each kind of scene the arms' means, and differences to keep, over the moving share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [("warp", name, title) for name, title in WARP.items()] + [("warp", "iou", "mask IoU")]
    if any("model" in points[0] for points in curves.values()):
        names += [("model", name, title) for name, title in MODEL.items()]
    size = 2 * len(curves)
    figure, axes = pyplot.subplots(len(names), size, figsize=(4.2 * size, 2.6 * len(names)), squeeze=False)
    for row, (part, name, title) in zip(axes, names):
        for i, (kind, points) in enumerate(curves.items()):
            panel(row[2 * i], points, part, name, "")
            panel(row[2 * i + 1], points, part, name, "difference")
            row[2 * i].set_title(f"{title} ({kind})", fontsize=9)
            row[2 * i + 1].set_title(f"{title}, less keep's ({kind})", fontsize=9)
            row[2 * i + 1].axhline(0, color="grey", linewidth=0.8)
            row[2 * i + 1].set_visible(name != "iou")  # which is no arm's
    for axis in axes[-1]:
        axis.set_xlabel("pixels that move, %")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="upper center", ncol=len(lines))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / len(names) / 2.6))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def panel(axis: Any, points: list[Row], part: str, name: str, which: str) -> None:
    """One metric's means, or differences, and their intervals as bands."""
    for arm, colour in COLOURS.items():
        known = [(100 * point["share"], point[part].get(arm, {}).get(name, {})) for point in points]
        known = [(x, told.get(which) if which else told) for x, told in known]
        known = [(x, told) for x, told in known if told and told["value"] is not None]
        if not known:
            continue
        x, values = [x for x, _ in known], [told["value"] for _, told in known]
        axis.plot(x, values, marker=".", color=colour, label=arm)
        edges = [[told["value"] if told[end] is None else told[end] for _, told in known] for end in ("low", "high")]
        axis.fill_between(x, *edges, color=colour, alpha=0.2, linewidth=0)


def line(point: Row) -> str:
    """The means of drop and carry with their differences to keep, and keep's, in one paragraph."""
    text = [f"{100 * point['share']:5.1f} % moving"]
    for part, names in (("warp", WARP), ("model", MODEL)):
        for name in names if part in point else ():
            cells = []
            for arm in MOVING:
                told = point[part][arm].get(name)
                if told is None:
                    continue
                gain = told.get("difference")
                cells.append(f"{arm} {told['value']:.2f}" + (
                    f" ({gain['value']:+.2f}, {gain['low']:+.2f} to {gain['high']:+.2f})"
                    if gain and None not in (gain["low"], gain["high"]) else ""))  # fmt: skip
            text += [f"    {part}, {names[name]}: {', '.join(cells)}"] if cells else []
    return "\n".join(text)


def of_shot(shot: Shot, model: Model | None, sparse: bool, relit: bool, seed: int, sheet: Path | None) -> Row:
    depth = sparse_depth(shot, seed) if sparse else shot.depth
    row: Row = {"share": shot.share, "warp": of_warp(shot, depth)}
    if model is not None:
        made, seen = model.made(shot, depth, seed), in_sight(shot)
        row["model"] = {arm: of_video(frames, shot, seen, relit) for arm, frames in made.items()}
        if sheet is not None:
            sheet.parent.mkdir(parents=True, exist_ok=True)
            with atomic(sheet) as file:
                file.write(media.png(media.sheet([shot.frames[LAST:], *made.values()], 9)))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "--adapter", type=Path, help="a run of warp_adapter/tiny or of its base")
    parser.add_argument("--scenes", type=int, default=8, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--depth", choices=("exact", "sparse"), default="exact")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/moving.json"))
    parser.add_argument("--plot", type=Path, help="PNG of the curves; wants matplotlib")
    parser.add_argument("--sheet", type=Path, help="a folder for pictures: a true chunk, then what was made, by arm")
    args = parser.parse_args()
    start, model = time.time(), None if args.model is None else Model(Generator.load(args.model, args.device))
    found: Row = {"curves": {}, "left_out": {}, "rows": {}}
    for kind in args.kinds:
        every: list[list[Row]] = [[] for _ in args.shares]
        clips, tried = standing(kind, args.seed), 0
        for number in tracked(range(args.scenes), f"{kind} scenes"):
            shots = None
            while shots is None:
                shots, tried = grades(next(clips), args.shares, derive_seed(args.seed, "moving", tried)), tried + 1
            for share, rows, shot in zip(args.shares, every, shots):
                sheet = args.sheet / f"{kind}_{number}_{100 * share:.0f}.png" if args.sheet and number < 2 else None
                seed = derive_seed(args.seed, "moving noise", number)
                rows.append(of_shot(shot, model, args.depth == "sparse", kind == "engine", seed, sheet))
        found["left_out"][kind] = tried - args.scenes
        points = [{"share": float(np.mean([row["share"] for row in rows])), "scenes": len(rows)}
                  | {part: told(rows, part) for part in rows[0] if part != "share"} for rows in every]  # fmt: skip
        found["curves"][kind], found["rows"][kind] = points, [[clean(row) for row in rows] for rows in every]
        print(kind, *map(line, points), sep="\n", flush=True)
    about = {"settings": {k: str(v) for k, v in vars(args).items()}, "seconds": time.time() - start} | environment()
    if model is not None:
        about |= {"model": model.generator.name, "weights": model.generator.weights_hash}
    write_json(args.out, about | found)
    if args.plot is not None:
        plot(found["curves"], args.plot)


if __name__ == "__main__":
    main()
