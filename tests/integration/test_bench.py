"""The whole bench on a synthetic world: cameras that turn before a wide painted wall, so every pose is exact."""

import hashlib
import json
import re
import resource
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from vgr import bench as bench_
from vgr.data.video import encode_video, read_video
from vgr.metrics.image import psnr
from vgr.models.codec import CosineCodec
from vgr.report import measure, results
from vgr.report.sets import open_set

FRAMES, FPS, H, W, FX = 25, 8.0, 32, 48, 0.8
PROTOCOL = {
    "name": "test", "clips": 6, "reference": 6, "frames": 97, "seed": 0, "sampling": {}, "sha256": "0" * 64,
    "drift": {"window_s": 0.5}, "frechet": {"window_frames": 12, "draws": 10},
    "frame_rate": {"warmup": 1, "requests": 2},
}  # fmt: skip


def wall(seed):
    rng = np.random.default_rng(seed)
    image = cv2.GaussianBlur(rng.uniform(0, 255, (H, 400, 3)).astype(np.float32), (0, 0), 2)
    return ((image - image.mean()) * 5 + 120).clip(0, 255).astype(np.uint8)


def view(image, yaw):
    shift = np.float32([[1, 0, -200 + W / 2 - yaw * FX * W], [0, 1, 0]])
    return cv2.warpAffine(image, shift, (W, H), borderMode=cv2.BORDER_REFLECT)


def turning(yaw_F):
    c2w = np.tile(np.eye(4), (len(yaw_F), 1, 1))
    c2w[:, 0, 0] = c2w[:, 2, 2] = np.cos(yaw_F)
    c2w[:, 0, 2], c2w[:, 2, 0] = np.sin(yaw_F), -np.sin(yaw_F)
    return c2w


def yaw_of(c2w_F44):
    relative = np.linalg.inv(c2w_F44[0]) @ c2w_F44
    return np.arctan2(relative[:, 0, 2], relative[:, 2, 2])


class World:
    """Shards of the synthetic world, as vgr.data.shards.Shards reads them."""

    def __init__(self, count=12):
        self.keys = [f"wall_{i:02d}" for i in range(count)]
        self.manifest = {"made": "here"}
        rng = np.random.default_rng(0)
        self.yaw = [np.cumsum(np.full(FRAMES, (-1) ** (i // 3) * (0.03 + 0.01 * rng.random()))) for i in range(count)]
        self.videos = [np.stack([view(wall(i), y) for y in yaw]) for i, yaw in enumerate(self.yaw)]

    def read(self, index):
        intrinsics = np.tile([FX, FX * W / H, 0.5, 0.5], (FRAMES, 1))
        meta = {"shots": [{"start": 0, "end": FRAMES, "caption": "<script>alert(1)</script> & a wall"}]}
        return SimpleNamespace(c2w=turning(self.yaw[index]), intrinsics=intrinsics, fps=FPS, meta=meta)

    def read_video_bytes(self, index):
        return encode_video(self.videos[index], FPS)


class Turner:
    """A generator that knows the world but forgets the light; it can be told to die at a call."""

    name, fps, stride, max_frames, size_hw, device = "turner", FPS, 4, 97, (H, W), "cpu"
    sampling, data_info = {"steps": 2, "shift": 1.0, "guidance": 1.0}, {}

    def __init__(self, weights_hash="aa", dies_at=None):
        self.weights_hash, self.dies_at, self.made = weights_hash, dies_at, []
        self.codec = CosineCodec(stride=(4, 4, 4), luma=(2, 1), chroma=(1,))

    def __call__(self, first_BHWC, cameras, captions, seeds, progress=None, watch=None, shot=None):
        if self.dies_at is not None and len(self.made) >= self.dies_at:
            raise KeyboardInterrupt
        assert cameras.c2w.shape[:2] == (len(first_BHWC), FRAMES) == (len(captions), FRAMES) and len(seeds) == len(
            captions
        )
        self.made += list(seeds)
        fade = (1 - 0.01 * np.arange(FRAMES))[:, None, None, None]
        videos = []
        for first, c2w in zip(first_BHWC, cameras.c2w.numpy()):
            steps = np.float32([[1, 0, 0], [0, 1, 0]]), yaw_of(c2w)
            moved = [cv2.warpAffine(first, steps[0] + np.float32([[0, 0, -y * FX * W], [0, 0, 0]]), (W, H),
                                    borderMode=cv2.BORDER_REFLECT) for y in steps[1]]  # fmt: skip
            videos.append((np.stack(moved) * fade).astype(np.uint8))
        videos = np.stack(videos)
        for start, end in ((0, 1), (1, 13), (13, FRAMES)) if watch is not None else ():
            watch(videos[:, start:end])
        timing = {"first_frame_s": 1e-6, "total_s": 3e-6, "denoise_s": 2e-6, "decode_s": 1e-6, "frames": FRAMES}
        return videos, timing


@pytest.fixture(scope="module")
def world():
    return World()


def shift_estimator(video, paths):
    """A stand-in for the pose estimator: the shift between neighbours by phase correlation."""
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY).astype(np.float32) for f in video]
    window = cv2.createHanningWindow((W, H), cv2.CV_32F)
    steps = [-cv2.phaseCorrelate(a, b, window)[0][0] / (FX * W) for a, b in zip(grey, grey[1:])]
    errors = [np.degrees(np.abs(np.array(steps) - np.diff(yaw_of(c2w)))).mean() for c2w, _ in paths]
    return [{"rot_step_imputed_deg": float(e), "pose_coverage": 1.0} for e in errors]


@pytest.fixture(autouse=True, scope="module")
def estimator():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "pose_values", shift_estimator)
        yield


@pytest.fixture(scope="module")
def finished(world, estimator, tmp_path_factory):
    out, run = tmp_path_factory.mktemp("bench") / "test", tmp_path_factory.mktemp("run") / "<b>bold<" / "b>"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"samples_seen": 784, "train/loss": 1.0}\n')
    (run / "config.yaml").write_text("note: </pre><script>alert(2)</script>\n")
    page = bench_.bench(PROTOCOL, out, generator=Turner(), shards=world, run_dir=run, batch=4)
    return out, json.loads((out / "results.json").read_text()), page


def test_rows_values_and_provenance(finished, world):
    out, found, _ = finished
    assert list(found["rows"]) == ["truth", "codec", "model", "swapped", "frozen"]
    assert found["clips"] == world.keys[:6] and found["frames"] == FRAMES and found["fps"] == FPS
    cells = {row: found["rows"][row]["metrics"] for row in found["rows"]}
    # PSNR of a row, computed here from the very files.
    for row in ("model", "frozen"):
        dB = [psnr(read_video(out / row / f"{k}.mp4")[0][1:], read_video(out / "truth" / f"{k}.mp4")[0][1:]).mean()
              for k in found["clips"]]  # fmt: skip
        cell = cells[row]["psnr_db"]
        assert cell["value"] == pytest.approx(np.mean(dB)) and cell["low"] <= cell["value"] <= cell["high"]
        assert cell["count"] == 6
    assert "psnr_db" not in cells["truth"]
    for good, bad in (("codec", "model"), ("model", "swapped"), ("model", "frozen")):
        assert cells[good]["psnr_db"]["value"] > cells[bad]["psnr_db"]["value"]
    assert cells["model"]["lightness_excess_per_s"]["high"] < 0  # it fades
    assert cells["truth"]["drift"]["value"] == 0 < cells["model"]["drift"]["value"]
    assert cells["frozen"]["motion_level"]["value"] < 0.01 * cells["truth"]["motion_level"]["value"]
    assert cells["model"]["fd_clipstats48"]["null_bias"] > 0 and "fvd" not in cells["model"]
    assert cells["model"]["frames_per_s"]["count"] == 2
    assert found["made_by"]["weights"] == "aa" and found["protocol"]["sha256"] == PROTOCOL["sha256"]
    assert {"commit", "device", "versions"} <= set(found) and found["metrics"]["psnr_db"]["how"]
    assert found["metrics"]["drift"]["settings"] == {"frames": FRAMES, "clips": 6, "window_s": 0.5}
    assert "I3D" in found["unavailable"]["fvd"]["why"] and "judge frames" in found["unavailable"]["lpips"]["why"]
    lines = [json.loads(x) for x in (out / "videos.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * 6
    model = [x["psnr_db"] for x in lines if x["row"] == "model"]
    assert np.mean(model) == pytest.approx(cells["model"]["psnr_db"]["value"])


def test_the_estimator_is_checked_and_the_model_beats_its_controls(finished):
    _, found, _ = finished
    check = found["checks"]["pose"]["rot_step_imputed_deg"]
    assert check["passed"] and check["own_camera"]["high"] < check["other_camera"]["low"]
    better = {(c["metric"], c["control"]): c["better"] for c in found["comparisons"]}
    assert better[("rot_step_imputed_deg", "swapped")] and better[("rot_step_imputed_deg", "frozen")]
    assert better[("psnr_db", "swapped")]
    assert set(found["checks"]["frame_order"]) == {"passed", "shuffled", "ordered", "null_bias"}


def test_an_estimator_that_cannot_tell_gives_no_number(world, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "pose_values", lambda v, p: [{"rot_step_imputed_deg": float(v.mean())}] * len(p))
    bench_.bench(PROTOCOL, tmp_path, generator=Turner(), shards=world)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["checks"]["pose"]["rot_step_imputed_deg"]["passed"] is False
    assert all("rot_step_imputed_deg" not in row["metrics"] for row in found["rows"].values())
    assert "does not tell" in found["unavailable"]["rot_step_imputed_deg"]["why"]
    assert not [c for c in found["comparisons"] if c["metric"] == "rot_step_imputed_deg"]


def test_page_is_whole_escaped_and_offline(finished):
    out, found, page = finished
    html = page.read_text()
    assert html.count("data:video/mp4;base64,") == 6 * 5 and (out / "contact_sheet.png").stat().st_size > 1000
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; a wall" in html
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in html and "784 training clips" in html
    assert "<b>bold</b>" not in html and "<h1>&lt;b&gt;bold&lt;/b&gt;</h1>" in html
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", html) and "default-src 'none'" in html
    assert "http://" not in html and "https://" not in html and len(html) < 15_000_000


def test_a_killed_run_continues_and_makes_nothing_twice(world, tmp_path, monkeypatch):
    dying = Turner(dies_at=5)
    with pytest.raises(KeyboardInterrupt):
        bench_.bench(PROTOCOL, tmp_path, generator=dying, shards=world, batch=1)
    stood = sorted(p.name for p in (tmp_path / "model").glob("*.mp4"))
    assert len(stood) == 5 and not (tmp_path / "results.json").exists()
    before = {n: (tmp_path / "model" / n).stat().st_mtime_ns for n in stood}

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    second = Turner()
    with monkeypatch.context() as patch:  # now killed between making and measuring
        patch.setattr(results, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            bench_.bench(PROTOCOL, tmp_path, generator=second, shards=world, batch=1)
    assert len(second.made) == 1 + 6 + 3  # the missing one, the swapped row, warm-up and two timed requests
    assert before == {n: (tmp_path / "model" / n).stat().st_mtime_ns for n in stood}
    third = Turner()
    bench_.bench(PROTOCOL, tmp_path, generator=third, shards=world, batch=1)
    assert third.made == [] and (tmp_path / "results.json").exists()
    fourth = Turner(weights_hash="bb")
    bench_.bench(PROTOCOL, tmp_path, generator=fourth, shards=world, batch=1)
    assert len(fourth.made) == 6 + 6 + 3
    assert json.loads((tmp_path / "results.json").read_text())["made_by"]["weights"] == "bb"


def test_videos_are_the_same_whatever_the_batch(finished, world, tmp_path):
    out, _, _ = finished
    one, many = Turner(), Turner()
    bench_.bench({**PROTOCOL, "clips": 3}, tmp_path / "a", generator=one, shards=world, batch=1)
    bench_.bench({**PROTOCOL, "clips": 3}, tmp_path / "b", generator=many, shards=world, batch=3)
    assert one.made[:3] == many.made[:3]
    digests = [hashlib.sha256((tmp_path / x / "model" / "wall_01.mp4").read_bytes()).digest() for x in "ab"]
    assert digests[0] == digests[1]


@pytest.fixture
def foreign(finished, tmp_path):
    """The model's videos as somebody else would hand them over: no set.json, no cameras."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for path in (finished[0] / "model").glob("*.mp4"):
        shutil.copy(path, folder)
    return folder


def test_videos_made_elsewhere_get_the_same_numbers(finished, foreign, world, tmp_path):
    bench_.bench(PROTOCOL, tmp_path / "out", videos=open_set(foreign), shards=world)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["rows"]) == ["truth", "model", "frozen"]
    for metric in ("psnr_db", "ssim", "rot_step_imputed_deg", "drift", "fd_clipstats48"):
        assert found["rows"]["model"]["metrics"][metric] == finished[1]["rows"]["model"]["metrics"][metric]
    assert "timings" in found["unavailable"]["frames_per_s"]["why"]
    assert sorted(p.name for p in foreign.iterdir()) == [f"{k}.mp4" for k in world.keys[:6]]  # nothing written there


def test_videos_alone_are_measured_as_far_as_possible(foreign, tmp_path):
    page = bench_.bench(PROTOCOL, tmp_path / "out", videos=open_set(foreign))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["rows"]) == ["model"] and found["rows"]["model"]["metrics"]["motion_level"]["value"] > 0
    missing = found["unavailable"]
    assert {"psnr_db", "ssim", "drift", "fd_clipstats48", "rot_step_imputed_deg", "fvd", "frames_per_s"} <= set(missing)
    assert "cameras" in missing["rot_step_imputed_deg"]["why"] and page.is_file()


def test_wrong_input_is_one_clear_line(foreign, world, tmp_path):
    (tmp_path / "empty").mkdir()
    refused = []

    def refuses(match, call):
        with pytest.raises(ValueError, match=match) as caught:
            call()
        refused.append(str(caught.value))

    refuses("holds no .mp4", lambda: open_set(tmp_path / "empty"))
    refuses("not a folder", lambda: open_set(tmp_path / "nowhere"))
    np.savez(foreign / "wall_00.cameras.npz", c2w=turning(np.zeros(FRAMES)), intrinsics=np.ones(4))
    refuses(r"wall_00.cameras.npz holds .* need c2w", lambda: open_set(foreign).cameras("wall_00", FRAMES))
    (foreign / "wall_00.cameras.npz").unlink()
    short = tmp_path / "short"
    shutil.copytree(foreign, short)
    (short / "wall_02.mp4").write_bytes(encode_video(world.videos[2][:17], FPS))
    refuses("wall_02.mp4 has 17 frames, 25 are measured", lambda: bench_.bench(
        PROTOCOL, tmp_path / "o1", videos=open_set(short), shards=world))  # fmt: skip
    small = tmp_path / "small"
    shutil.copytree(foreign, small)
    (small / "wall_03.mp4").write_bytes(encode_video(world.videos[3][:, :16, :16], FPS))
    refuses("is 16x16, the true video 48x32", lambda: bench_.bench(
        PROTOCOL, tmp_path / "o2", videos=open_set(small), shards=world))  # fmt: skip
    strange = tmp_path / "strange"
    strange.mkdir()
    shutil.copy(foreign / "wall_00.mp4", strange / "other.mp4")
    refuses("is named like a clip", lambda: bench_.bench(
        PROTOCOL, tmp_path / "o3", videos=open_set(strange), shards=world))  # fmt: skip
    large = Turner()
    large.size_hw = (48, 64)
    refuses("data is 48x32, the checkpoint makes 64x48", lambda: bench_.bench(
        PROTOCOL, tmp_path / "o4", generator=large, shards=world))  # fmt: skip
    (tmp_path / "o5" / "model").mkdir(parents=True)
    shutil.copy(foreign / "wall_00.mp4", tmp_path / "o5" / "model")
    refuses("videos without a set.json", lambda: bench_.bench(
        PROTOCOL, tmp_path / "o5", generator=Turner(), shards=world))  # fmt: skip
    assert all("\n" not in text for text in refused)


def test_protocols_are_refused_by_name(tmp_path):
    smoke = bench_.load_protocol("smoke")
    assert smoke["clips"] >= 32 and len(smoke["sha256"]) == 64
    with pytest.raises(ValueError, match="protocol=smok does not exist; choose .*smoke"):
        bench_.load_protocol("smok")
    (tmp_path / "p.yaml").write_text("name: x\nclipz: 3\n")
    with pytest.raises(ValueError, match="clipz"):
        bench_.load_protocol(str(tmp_path / "p.yaml"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["checkpoint=nothing"], "no checkpoint here"),
        (["protcol=smoke", "checkpoint=nothing"], "did you mean `protocol`?"),
        (["protocol=smok", "checkpoint=nothing"], "protocol=smok does not exist"),
        (["videos=nowhere"], "is not a folder"),
        ([], "either checkpoint"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2_and_write_nothing(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vgr-bench", *words])
    with pytest.raises(SystemExit) as ended:
        bench_.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and told in err and err.count("\n") == 1 and err.startswith("vgr-bench: error:")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_only_whole_videos_and_the_run_continues(finished, world, tmp_path):
    limit = min(p.stat().st_size for p in (finished[0] / "truth").glob("*.mp4"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError):
            bench_.bench(PROTOCOL, tmp_path / "out", generator=Turner(), shards=world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "out" / "results.json").exists()
    for path in tmp_path.rglob("*.mp4"):
        assert len(read_video(path)[0]) == FRAMES
    bench_.bench(PROTOCOL, tmp_path / "out", generator=Turner(), shards=world)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["rows"]["model"]["metrics"]["psnr_db"] == finished[1]["rows"]["model"]["metrics"]["psnr_db"]


def without_times(found):
    """results.json but for what a clock or the machine's memory said."""
    timed = [k for k, m in found["metrics"].items() if m["section"] == "frame_rate"]
    rows = {r: x | {"metrics": {k: c for k, c in x["metrics"].items() if k not in timed}}
            for r, x in found["rows"].items()}  # fmt: skip
    return found | {"rows": rows}


def test_parts_share_the_work_and_merge_to_the_same_numbers(finished, world, tmp_path):
    makers = [Turner() for _ in range(3)]
    for i in (2, 0, 1):  # in any order
        assert bench_.bench(PROTOCOL, tmp_path, generator=makers[i], shards=world, part=(i, 3), batch=4) is None
    assert [len(t.made) for t in makers] == [2 + 2 + 3, 2 + 2, 2 + 2]  # the first one measures speed
    assert not (tmp_path / "results.json").exists()
    last = Turner()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*") if p.suffix in (".mp4", ".npz", ".json")}
    page = bench_.bench(PROTOCOL, tmp_path, generator=last, shards=world)
    assert last.made == [] and page.is_file()  # nothing is made again, nor measured again
    assert before == {p: p.stat().st_mtime_ns for p in before}
    found = json.loads((tmp_path / "results.json").read_text())
    assert without_times(found) == without_times(finished[1])
    assert found["rows"]["model"]["metrics"]["steady_frames_per_s"]["count"] == 2
    lines = [(out / "videos.jsonl").read_text() for out in (tmp_path, finished[0])]
    assert lines[0] == lines[1]


def test_a_measured_video_is_measured_again_when_its_bytes_change(finished, world, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    key = world.keys[0]
    changed = read_video(out / "model" / f"{key}.mp4")[0] // 2
    (out / "model" / f"{key}.mp4").write_bytes(encode_video(changed, FPS))
    bench_.bench(PROTOCOL, out, generator=Turner(), shards=world)
    rows = [[json.loads(x) for x in (o / "videos.jsonl").read_text().splitlines()] for o in (out, finished[0])]
    differ = {(a["row"], a["key"]) for a, b in zip(*rows) if a != b}
    assert differ == {("model", key)}


def test_drift_stands_beside_truth_codec_and_chance(finished):
    _, found, page = finished
    table = found["drift"]
    assert list(table) == list(found["rows"]) and set(table["model"]) == set(table["truth"])
    fading = table["model"]["lightness"]
    assert fading["over_truth_per_s"]["high"] < 0 and fading["over_codec_per_s"]["high"] < 0
    assert fading["over_truth_per_s"]["value"] == pytest.approx(
        found["rows"]["model"]["metrics"]["lightness_excess_per_s"]["value"])  # fmt: skip
    assert fading["end_minus_start_size"]["value"] > 2 * fading["size_floor"]
    assert "over_truth_per_s" not in table["truth"]["lightness"]
    cells = {row: x["metrics"] for row, x in found["rows"].items()}
    assert cells["frozen"]["stagnation"]["value"] == 1 and cells["truth"]["stagnation"]["value"] < 0.5
    assert cells["model"]["time_to_failure_s"]["value"] <= cells["truth"]["time_to_failure_s"]["value"]
    assert "By chance" in page.read_text()
    compared = [c for c in found["comparisons"] if c["control"] == "swapped" and c["metric"] == "psnr_db"][0]
    assert compared["p"] == 2 / 2**6 and compared["rank_biserial"] == 1 and compared["count"] == 6


def test_a_streaming_models_controls_are_timed_to_the_frame_that_shows_them(world, tmp_path):
    class Streaming(Turner):
        chunk = 3  # latent frames beside the first: the second chunk begins at frame 13, as the second piece ends

    generator = Streaming()
    bench_.bench({**PROTOCOL, "clips": 4}, tmp_path, generator=generator, shards=world)
    info = json.loads((tmp_path / "model" / "set.json").read_text())
    assert info["chunk_starts"] == [13]
    cells = json.loads((tmp_path / "results.json").read_text())["rows"]["model"]["metrics"]
    assert cells["control_latency_s"]["count"] == 1 and 0 < cells["control_latency_s"]["value"] < 1
    assert cells["seam_ratio"]["count"] == 4
    assert len(generator.made) == 4 + 4 + 3 + 2  # both rows, warm-up and two requests, and the pair that is compared


class Mean:
    """A network of two features, so that its distances are quickly computed."""

    frames = 12

    @staticmethod
    def features(clips):
        return np.stack([clips.mean((1, 2, 3, 4)), clips[:, -1].mean((1, 2, 3)) - clips[:, 0].mean((1, 2, 3))], axis=1)


def test_networks_give_fvd_with_its_companions_and_statistics_serve_later_runs(world, tmp_path, monkeypatch):
    from vgr.metrics import extractors
    from vgr.metrics.fvd import frechet_distance

    network = extractors.Extractor(Mean.frames, {"extractor": "i3d_torchscript", "sha256": "ab"}, Mean.features)
    monkeypatch.setattr(extractors, "load", lambda folder, frames, device: {"fvd": network})
    protocol = {**PROTOCOL, "fvd": {"frames": 12, "stride": 1}}
    bench_.bench(protocol, tmp_path / "a", generator=Turner(), shards=world)
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    cell = found["rows"]["model"]["metrics"]["fvd"]
    videos = [read_video(tmp_path / "a" / "model" / f"{k}.mp4")[0] for k in world.keys[:6]]
    kept = [json.loads((tmp_path / "a" / "measured" / "reference" / f"{k}.json").read_text()) for k in world.keys[6:]]
    true = np.concatenate([x["features"]["fvd"] for x in kept])
    ours = np.concatenate([Mean.features(v[None, 1:13]) for v in videos])  # the given first frame is left out
    assert cell["value"] == pytest.approx(frechet_distance(ours, true, ddof=0))
    assert cell["low"] <= cell["value"] <= cell["high"] and cell["null_bias"] > 0 and cell["windows"] == 6
    assert cell["mmd"]["count"] == 6 and found["metrics"]["fvd"]["settings"]["weights"]["sha256"] == "ab"
    assert set(found["checks"]["frame_orders"]) == {"fvd", "fd_clipstats48"}
    assert "fvd" not in found["unavailable"] and "videomae" in found["unavailable"]["fd_videomae"]["why"]
    theirs = open_set(tmp_path / "a" / "model")
    bench_.bench(protocol, tmp_path / "b", videos=theirs, statistics=tmp_path / "a" / "statistics")
    alone = json.loads((tmp_path / "b" / "results.json").read_text())["rows"]["model"]["metrics"]
    assert alone["fvd"]["value"] == pytest.approx(cell["value"]) and alone["fvd"]["low"] is None
    assert alone["fd_clipstats48"]["value"] == pytest.approx(
        found["rows"]["model"]["metrics"]["fd_clipstats48"]["value"])  # fmt: skip


def test_anyones_videos_are_measured_whole_without_weights_or_data(world, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    long = np.concatenate([world.videos[0], world.videos[5], world.videos[5][::-1]])
    for name, video in (("long & <b>", long), ("short", world.videos[1]), ("wide", world.videos[2][:, :, :40])):
        (folder / f"{name}.mp4").write_bytes(encode_video(video, FPS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vgr-bench", f"videos={folder}"])
    bench_.main()
    out = tmp_path / "runs" / "bench" / "theirs" / "general"
    assert capsys.readouterr().out.strip() == str(out.relative_to(tmp_path) / "report.html")
    found = json.loads((out / "results.json").read_text())
    lines = {x["key"]: x for x in map(json.loads, (out / "videos.jsonl").read_text().splitlines())}
    assert list(lines) == ["long & <b>", "short", "wide"] and found["protocol"]["name"] == "general"
    assert [lines[k]["cuts"] for k in lines] == [1, 0, 0]
    cells = found["rows"]["model"]["metrics"]
    assert cells["motion_level"]["count"] == 3 and "psnr_db" not in cells
    assert cells["cuts"]["value"] == pytest.approx(1 / 3)
    assert found["drift"]["model"]["noise"]["per_s"]["count"] == 3
    assert {"drift", "fvd", "psnr_db", "frames_per_s"} <= set(found["unavailable"])
    assert found["unavailable"]["rot_imputed_deg"]["why"] == "no cameras"
    html = (out / "report.html").read_text()
    assert html.count("data:video/mp4;base64,") == 3 and "each measured whole" in html
    assert "long &amp; &lt;b&gt;" in html and "long & <b>" not in html


def test_check_says_what_is_there_and_what_stays_empty(tmp_path, monkeypatch, capsys):
    (tmp_path / "weights" / "videomae").mkdir(parents=True)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(encode_video(np.zeros((9, 16, 16, 3), np.uint8), FPS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vgr-bench", "videos=clips", "protocol=standard", "check=true"])
    bench_.main()
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("protocol standard, sha256 ")
    assert any(x.startswith("fvd: no weights/i3d_torchscript.pt; put i3d_torchscript.pt (51 MB") for x in told)
    assert "fd_videomae: weights/videomae is there" in told
    assert "true videos: none; give shards=<val shards>" in told and "cameras: none; add <key>.cameras.npz" in told
    empty = {x.split(": ")[1] for x in told if x.startswith("empty: ")}
    assert {"fvd", "fd_videomae", "psnr_db", "drift", "memory_db", "rot_imputed_deg"} <= empty
    assert not {"motion_level", "cuts", "frames_per_s"} & empty
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clips", "weights"]  # and nothing was done


@pytest.mark.parametrize(
    ("words", "told"),
    [(["part=3/3"], "part=3/3: must be i/n"), (["part=-1/3"], "part=-1/3"), (["part=two"], "part=two"),
     (["protocol=general", "shards=here"], "measures videos by themselves")],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(tmp_path, monkeypatch, capsys, words, told):
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vgr-bench", "videos=.", *words])
    with pytest.raises(SystemExit):
        bench_.main()
    assert told in capsys.readouterr().err


def judges_of(world):
    """Judges with a known answer: distance of mean colours; colours as features; captions told by their length."""
    from vgr.report.judges import Judge

    def colours(frames):
        return frames.mean((1, 2)) + 1.0

    return {
        "lpips": Judge({"sha256": "aa"}, lambda a, b: np.abs(colours(a) - colours(b)).mean(1) / 255),
        "dino": Judge({"sha256": "bb"}, colours),
        "clip": Judge({"sha256": "cc"}, colours, lambda texts: np.array([[1.0, len(t), 0.0] for t in texts])),
    }


def test_frames_are_judged_where_a_protocol_asks_and_weights_or_features_are_there(world, tmp_path, monkeypatch):
    from vgr.report import judges

    monkeypatch.setattr(judges, "load", lambda folder, device: judges_of(world))
    protocol = {**PROTOCOL, "clips": 4, "quality": {"clip_per_s": 2.0}}
    bench_.bench(protocol, tmp_path, generator=Turner(), shards=world)
    found = json.loads((tmp_path / "results.json").read_text())
    cells = {row: x["metrics"] for row, x in found["rows"].items()}
    assert cells["codec"]["lpips"]["value"] < cells["model"]["lpips"]["value"] and "lpips" not in cells["truth"]
    still, real = (cells[row]["temporal_flickering"]["value"] for row in ("frozen", "truth"))
    assert still == pytest.approx(1, abs=1e-3) and real < 0.99  # to what the mp4's encoder makes of a still
    assert cells["frozen"]["subject_consistency"]["value"] == pytest.approx(1, abs=1e-6)
    assert cells["codec"]["ssim_uniform"]["value"] > cells["frozen"]["ssim_uniform"]["value"]
    for name in ("ssim_uniform", "background_consistency", "clip_score", "clip_score_other"):
        assert cells["model"][name]["count"] == 4, name
    why = found["unavailable"]["imaging_quality"]["why"]
    assert "no features" in why and "vbench_quality" in found["unavailable"] and "lpips" not in found["unavailable"]
    # Features beside the videos fill what no network of ours gives, and are measured anew when they change.
    for key in found["clips"]:
        rest = {"interpolated": np.zeros((12, H, W, 3), np.uint8), "flow": np.full(24, 2.0)}
        rest |= {"aesthetic": np.full(FRAMES, 5.0), "imaging": np.linspace(66.5, 73.5, FRAMES)}
        np.savez(tmp_path / "model" / f"{key}.features.npz", **rest)
    page = bench_.bench(protocol, tmp_path, generator=Turner(), shards=world)
    cells = json.loads((tmp_path / "results.json").read_text())["rows"]["model"]["metrics"]
    assert cells["imaging_quality"]["value"] == pytest.approx(0.7) and cells["dynamic_degree"]["value"] == 1
    assert cells["imaging_first"]["value"] == pytest.approx(66.9375)  # windows of half a second, four frames
    assert cells["imaging_drop"]["value"] == pytest.approx(66.9375 - 73.0625)
    assert cells["vbench_quality"]["count"] == 4 and "VBench quality" in page.read_text()
    np.savez(tmp_path / "model" / f"{found['clips'][0]}.features.npz", flow=np.full(3, np.nan))
    with pytest.raises(ValueError, match="features.npz: features flow .3,.: known, finite"):
        bench_.bench(protocol, tmp_path, generator=Turner(), shards=world)


def bench_folder(folder, keys, yaw):
    """A split of SANA-WM-Bench in its published layout, small."""
    export = folder / "benchmark_v2_smooth_60s" / "sanawm_export_v2"
    export.mkdir(parents=True)
    (folder / "images").mkdir()
    pixels = np.array([[FX * 2 * W, 0, W], [0, FX * 2 * W, H], [0, 0, 1.0]])
    for i, key in enumerate(keys):
        image = cv2.resize(view(wall(i), 0.0), (2 * W, 2 * H), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(folder / "images" / f"{key}.png"), image[..., ::-1])
        np.savez(export / f"{key}.npz", c2w=turning(yaw), intrinsics=np.tile(pixels, (len(yaw), 1, 1)),
                 fps=2 * FPS, num_frames=len(yaw))  # fmt: skip
    rows = [json.dumps({"id": key, "prompt": f"a wall <{key}>"}) + "\n" for key in keys]
    (export / "run_manifest.jsonl").write_text("".join(rows))
    return export.parent


class Steered(Turner):
    """A generator that takes cameras, one chunk-causal latent frame at a time."""

    chunk, takes_cameras, intrinsics, max_frames = 1, True, [FX, FX * W / H, 0.5, 0.5], FRAMES


def test_requests_in_the_published_layout_are_made_measured_and_set_beside_what_is_published(tmp_path):
    from vgr.report.requests import read_requests

    split = bench_folder(tmp_path / "bench", ["s1", "s2", "s3"], 0.01 * np.arange(2 * FRAMES - 1))
    requests = read_requests(split)
    assert [r.key for r in requests] == ["s1", "s2", "s3"] and requests[0].captions == ("a wall <s1>",)
    protocol = {**PROTOCOL, "frames": FRAMES, "published": {"name": "sana_wm_bench", "table": "simple"},
                "quality": {"clip_per_s": 1.0}}  # fmt: skip
    generator = Steered()
    page = bench_.bench(protocol, tmp_path / "out", generator=generator, requests=requests)
    made = open_set(tmp_path / "out" / "model")
    c2w, intrinsics = made.cameras("s1", None)
    # Poses 16 a second come to the model's 8; intrinsics in source pixels to shares of the picture.
    np.testing.assert_allclose(yaw_of(c2w), 0.02 * np.arange(FRAMES), atol=1e-6)
    np.testing.assert_allclose(intrinsics[0], [FX, FX * W / H, 0.5, 0.5], atol=1e-6)
    first, truth = made.video("s2", FRAMES)[0][0], view(wall(1), 0.0)
    assert psnr(first[None], truth[None])[0] > 20
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["rows"]["model"]["metrics"]["frames_per_s"]["count"] == 2
    beside = found["published"]
    assert beside["table"] == "simple" and any(r["system"] == "SANA-WM" for r in beside["rows"])
    flicker = next(k for k, c in beside["columns"].items() if c["ours"] == "temporal_flickering")
    cell = found["rows"]["model"]["metrics"]["temporal_flickering"]
    assert beside["ours"][flicker] == pytest.approx(100 * cell["value"])
    html = page.read_text()
    assert "Beside what is published" in html and "Measured here" in html and "a wall &lt;s1&gt;" in html
    count = len(generator.made)
    bench_.bench(protocol, tmp_path / "out", generator=generator, requests=requests)
    assert len(generator.made) == count  # what stands is not made again
    bench_.bench(protocol, tmp_path / "out", generator=Steered("bb"), requests=requests)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["made_by"]["weights"] == "bb"


def test_stories_share_their_frames_and_cut_where_chunks_begin(tmp_path, monkeypatch):
    from vgr.report.requests import read_requests

    class Director(Steered):
        takes_cameras, chunk = False, 1

        def __call__(self, first, cameras, captions, seeds, progress=None, watch=None, shot=None):
            self.asked = captions, shot, first
            return super().__call__(np.zeros((len(captions), H, W, 3), np.uint8), cameras, captions, seeds, watch=watch)

    path = tmp_path / "stories.json"
    told = [{"key": f"k{i}", "shots": [f"shot {i} {n}" for n in range(3)], "returns": [[0, 2]]} for i in range(2)]
    path.write_text(json.dumps({"prompts": told}))
    director = Director()
    from vgr.report import judges

    monkeypatch.setattr(judges, "load", lambda folder, device: {"dino": judges_of(None)["dino"]})
    protocol = {**PROTOCOL, "frames": 999, "shots": {}, "quality": {"clip_per_s": 1.0}}
    bench_.bench(protocol, tmp_path / "out", generator=director, requests=read_requests(path))
    captions, shot, first = director.asked
    assert first is None and captions[0] == ("shot 0 0", "shot 0 1", "shot 0 2") or captions[0][0] == "shot 1 0"
    assert shot[0].tolist() == [0, 0, 0, 1, 1, 2, 2]  # 6 chunks after the first frame, two a shot
    info = json.loads((tmp_path / "out" / "model" / "set.json").read_text())
    assert info["cuts"]["k0"] == [9, 17] and info["captions"]["k1"][2] == "shot 1 2"
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]["model"]["metrics"]
    assert cells["sca"]["count"] == cells["intra_shot"]["count"] == cells["inter_shot"]["count"] == 2
    many = [{"key": "k", "shots": [str(n) for n in range(7)]}]
    path.write_text(json.dumps({"prompts": many}))
    with pytest.raises(ValueError, match="7 shots in 25 frames: turner has 6 chunks there"):
        bench_.bench(PROTOCOL, tmp_path / "more", generator=director, requests=read_requests(path))


@pytest.mark.parametrize(("make", "told"), [
    (lambda p: p / "none", "does not exist"),
    (lambda p: p, "holds no <key>.caption.txt"),
    (lambda p: [(p / "a.json").write_text("[1]"), p / "a.json"][1], "must hold"),
    (lambda p: [(p / "a.json").write_text("{"), p / "a.json"][1], "is no JSON"),
])  # fmt: skip
def test_requests_that_are_none_are_told_apart(tmp_path, make, told):
    from vgr.report.requests import read_requests

    with pytest.raises((ValueError, FileNotFoundError), match=told):
        read_requests(make(tmp_path))


def test_a_folder_of_requests_needs_what_the_model_takes(tmp_path):
    from vgr.report.requests import read_requests

    (tmp_path / "a.caption.txt").write_text("one\ntwo\n")
    (tmp_path / "b.caption.txt").write_text("three\n")
    poses = {"c2w": turning(np.zeros(9)), "intrinsics": np.tile([FX, FX * W / H, 0.5, 0.5], (9, 1)), "fps": FPS}
    np.savez(tmp_path / "b.npz", **poses)
    requests = read_requests(tmp_path)
    assert requests[0] == ("a", ("one", "two"), None, None, (), True) and requests[1].poses == tmp_path / "b.npz"
    with pytest.raises(ValueError, match="requests: a has no poses, but turner takes cameras"):
        bench_.bench(PROTOCOL, tmp_path / "out", generator=Steered(), requests=requests)
    np.savez(tmp_path / "a.npz", **poses)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((H, W, 3), np.uint8))
    (tmp_path / "a.caption.txt").write_text("one\n")
    with pytest.raises(ValueError, match="b have no first frame and others do"):
        bench_.bench(PROTOCOL, tmp_path / "out", generator=Steered(), requests=read_requests(tmp_path))
    assert not (tmp_path / "out" / "model").exists()


def test_results_stand_in_an_offline_wandb_run_number_by_number(world, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from vgr.training.tracking import start_wandb

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing may be reached, and nothing is missed
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = start_wandb(tmp_path, {"protocol": PROTOCOL}, "vgr", None, "offline", job="evaluate", step="time_s")
    files, summary, finish = tmp_path / "wandb", {}, run.finish
    monkeypatch.setattr(run, "finish", lambda: (summary.update(dict(run.summary)), finish()))
    bench_.bench({**PROTOCOL, "clips": 3}, tmp_path, generator=Turner(), shards=world, wandb_run=run)
    found = json.loads((tmp_path / "results.json").read_text())
    lines = [json.loads(x) for x in (tmp_path / "videos.jsonl").read_text().splitlines()]
    assert list(files.glob("offline-run-*/run-*.wandb"))
    table = json.loads(next(files.rglob("*.table.json")).read_text())
    assert len(table["data"]) == len(lines) == 3 * len(found["rows"])
    column = {name: i for i, name in enumerate(table["columns"])}
    for told, line in zip(table["data"], lines):
        assert (told[column["row"]], told[column["key"]]) == (line["row"], line["key"])
        assert all(told[column[k]] == v for k, v in line.items()) and told[column["video"]] is not None
    for row, cells in found["rows"].items():
        for name, cell in cells["metrics"].items():
            if cell["value"] is not None:
                assert summary[f"{row}/{name}"] == pytest.approx(cell["value"]), (row, name)
    assert summary["time_s"] == max(max(c["times_s"]) for c in found["curves"].values())
