"""Frozen protocols and prompt sets: in form, told truly by check=true, and prompts that change without a cut."""

import hashlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vgr import bench
from vgr.data import shards
from vgr.generator import Generator
from vgr.models.causal_video import CausalVideo
from vgr.models.codec import CosineCodec
from vgr.models.text import ByteTextEncoder
from vgr.report import judges
from vgr.report.judges import Judge
from vgr.report.requests import read_requests
from vgr.report.sets import open_set
from vgr.report.table import METRICS
from vgr.types import Cameras

ROOT = Path(__file__).parents[2]
NAMES = sorted(p.stem for p in (ROOT / "benchmarks/protocols").glob("*.json"))
SECTIONS = {
    "drift": {"window_s"}, "frechet": {"window_frames", "draws"}, "fvd": {"frames", "stride"},
    "frame_rate": {"warmup", "requests"}, "shots": set(), "quality": {"clip_per_s"}, "revisit": {"gap_s"},
    "pose": {"frames", "per_s", "least_height", "long_side"}, "published": {"name", "table"},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_is_whole_and_can_fill_its_own_columns(name):
    protocol = bench.load_protocol(name)
    text = (ROOT / f"benchmarks/protocols/{name}.json").read_bytes()
    assert protocol["sha256"] == hashlib.sha256(text).hexdigest() and protocol["name"] == name
    assert len(protocol["about"]) > 100 and protocol["about"].endswith("Frozen: change the name with the content.")
    assert all(set(protocol[k]) == keys for k, keys in SECTIONS.items() if k in protocol)
    assert set(protocol["sampling"]) <= set(inspect.signature(Generator.load).parameters)
    assert {m.section for m in METRICS.values()} - {""} <= bench.NEEDED | bench.OPTIONAL
    if (frames := protocol["frames"]) is None:
        return
    if "fvd" in protocol:
        assert (protocol["fvd"]["frames"] - 1) * protocol["fvd"]["stride"] + 1 <= frames - 1  # the first is left out
    if seconds := protocol["sampling"].get("seconds"):
        assert frames == 1 + 24 * seconds and protocol["requests"]
    else:
        seconds = (frames - 1) / 16
    assert seconds >= 3 * protocol["drift"]["window_s"] and frames > protocol["frechet"]["window_frames"]
    if "pose" in protocol:
        assert protocol["pose"]["frames"] / protocol["pose"]["per_s"] <= seconds + 2
    assert protocol["reference"] == 0 or protocol["reference"] >= protocol["clips"] // 2


def test_forty_sequences_of_six_prompts_are_one_take_each():
    told = json.loads((ROOT / "benchmarks/prompts/interactive_v1.json").read_text(encoding="ascii"))
    kinds = [p["category"] for p in told["prompts"]]
    assert set(kinds) == {"person", "animal", "vehicle", "landscape", "indoor"}
    assert {kinds.count(k) for k in kinds} == {8}
    prompts = [shot for p in told["prompts"] for shot in p["shots"]]
    assert len(set(prompts)) == len(prompts) == 240 and {len(p["shots"]) for p in told["prompts"]} == {6}
    assert all(15 <= len(x.split()) <= 40 and x.endswith(".") for x in prompts)
    requests = read_requests(ROOT / "benchmarks/prompts/interactive_v1.json")
    assert len({r.key for r in requests}) == 40 and not any(r.cuts for r in requests)
    assert len({p["story"] for p in told["prompts"]}) == 40
    long = read_requests(ROOT / "benchmarks/prompts/long_v1.json")
    assert [(r.key, r.captions) for r in long] == [(r.key, r.captions[:1]) for r in requests]
    assert all(r.cuts for r in read_requests(ROOT / "benchmarks/prompts/multi_shot_v1.json"))


def told_by(name, data=None, requests=None, clips=0, monkeypatch=None):
    if data:
        monkeypatch.setattr(shards, "Shards", lambda folder: range(clips))
    protocol = bench.load_protocol(name)
    if requests is None and protocol.get("requests"):
        requests = read_requests(ROOT / protocol["requests"])
    return bench.check(protocol, Path("no weights"), data, bool(data), None, requests)


@pytest.mark.parametrize(("name", "asked", "beside"), [
    ("interactive_v1",
     "asked for: 40 videos, 0 with first frames, 0 with cameras, 60 s each, by a checkpoint that streams",
     "CLIP score, 50 to 60 s, beside our CLIP score, caption 6; other prompts"),
    ("long_v1", "asked for: 40 videos, 0 with first frames, 0 with cameras, 30 s each, by a checkpoint that streams",
     "Imaging quality, first less last 5 s, beside our Imaging quality lost; "),
    ("worldscore", "asked for: nothing; a checkpoint needs requests=<folder>, see vgr/report/requests.py",
     "Camera control, beside our Camera control as worldscore; cameras by DROID-SLAM"),
    ("davis", "true videos: none; give shards=<val shards>", "FID; none of ours"),
    ("realestate10k", "true videos: none; give shards=<val shards>", None),
])  # fmt: skip
def test_check_says_what_is_asked_what_stays_empty_and_what_stands_beside(name, asked, beside):
    told = told_by(name)
    assert told[1].startswith("about: ") and asked in told
    assert any(x.startswith("clip: no no weights/clip; put config.json") for x in told)
    assert "other networks' features: add <key>.features.npz beside the videos, see vgr/metrics/vbench.py" in told
    networks = any(x.startswith("fvd: no no weights/i3d_torchscript.pt; put") for x in told)
    assert networks == (name in ("davis", "realestate10k"))
    empty = {x.split(": ")[1] for x in told if x.startswith("empty: ")}
    assert {"psnr_db", "fvd", "clip_score", "memory_db", "rot_step_imputed_deg", "imaging_drop"} <= empty
    assert ("sfm_coverage" in empty) == (name not in ("worldscore", "realestate10k"))
    rows = [x.removeprefix("published: ") for x in told if x.startswith("published: ")]
    if name == "long_v1":
        of_videos = bench.check(bench.load_protocol(name), Path("none"), None, False, None, features=True)
        assert "other networks' features: there" in of_videos
        assert not [x for x in of_videos if x.startswith("empty: imaging")]
        assert "asked for: nothing; captions of videos= come from their set.json, see vgr/report/sets.py" in of_videos
    assert not rows if beside is None else any(x.startswith(beside) for x in rows)


def test_check_counts_the_clips_that_distances_want(monkeypatch):
    for clips, enough in ((66, False), (67, True)):
        told = told_by("davis", "davis/val", clips=clips, monkeypatch=monkeypatch)
        assert f"true videos: davis/val, {clips} clips" in told and "cameras: there" in told
        empty = {x.split(": ")[1] for x in told if x.startswith("empty: ")}
        assert ("fd_clipstats48" in empty) != enough and "psnr_db" not in empty


K, FPS, CHUNK = [0.5, 0.5, 0.5, 0.5], 8.0, 3  # a chunk is 6 frames, 0.75 s
STORIES = {"a": ("sits", "stands up", "walks"), "b": ("rain", "sun", "snow")}
PROTOCOL = {
    "name": "test", "clips": 2, "reference": 0, "frames": 109, "seed": 0, "sampling": {"seconds": 4.5},
    "sha256": "0" * 64, "drift": {"window_s": 0.75}, "frechet": {"window_frames": 12, "draws": 10}, "shots": {},
    "frame_rate": {"warmup": 0, "requests": 1}, "quality": {"clip_per_s": 2.0},
}  # fmt: skip
FRAMES, STARTS = 37, [13, 25]  # 4.5 s of six chunks, two a prompt


@pytest.fixture
def generator():
    """A random four-step student that keeps a shot's first frames in memory, trained on 13 frames."""
    torch.manual_seed(0)
    codec = CosineCodec(stride=(2, 8, 8), luma=(1,), chroma=(1,))
    model = CausalVideo(codec.channels, width=24, heads=2, layers=2, ffn_width=32, text_width=16, text_length=16,
                        window=1, shot_sink=2)  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    record = {"fps": FPS, "max_frames": 13, "size_hw": [32, 32], "intrinsics": K, "chunk": CHUNK}
    parts = {"model": model, "text": ByteTextEncoder(16, 16, 1, 2), "codec": codec}
    sampling = {"method": "stream", "steps": 2, "shift": 1.0, "guidance": 1.0, "sigmas": [1.0, 0.6, 0.0],
                "cut_prefix": "Cut. "}  # fmt: skip
    return Generator(parts, record, "student", "aa", {}, sampling, "cpu")


@pytest.fixture
def requests(tmp_path):
    rows = [{"key": k, "shots": list(x)} for k, x in STORIES.items()]
    (tmp_path / "stories.json").write_text(json.dumps({"cuts": False, "prompts": rows}))
    return read_requests(tmp_path / "stories.json")


def made_of(generator, captions, cuts):
    cameras = Cameras(torch.eye(4).expand(1, FRAMES, 4, 4), torch.tensor(K).expand(1, FRAMES, 4))
    shot = torch.from_numpy(shards.latent_shots([0, *STARTS], 19, 2))[None]
    return generator(None, cameras, (captions,), [5], shot=shot, cuts=cuts)[0][0]


def test_prompts_that_change_without_a_cut_are_what_a_session_says_without_one(generator):
    generator.max_frames = FRAMES
    session, pieces = generator.session(5), []
    for prompt in STORIES["a"]:
        session.append(prompt, 1.5, cut=False)
        pieces += [x.numpy() for x in session.frames()]
    flowing = made_of(generator, STORIES["a"], cuts=False)
    assert np.array_equal(flowing, np.concatenate(pieces))
    assert not np.array_equal(flowing, made_of(generator, STORIES["a"], cuts=True))  # the memory's shot, and the mark
    assert not np.array_equal(flowing[13:], made_of(generator, STORIES["a"][:1] * 3, cuts=False)[13:])
    with pytest.raises(ValueError, match="37 frames asked; this model makes up to 13"):
        generator.max_frames = 13
        made_of(generator, STORIES["a"], cuts=False)


def test_an_interactive_set_is_told_without_cuts_and_scored_by_its_own_captions(
    generator, requests, tmp_path, monkeypatch
):
    heard, forward = [], CausalVideo.forward
    monkeypatch.setattr(CausalVideo, "forward", lambda self, x, t, cond, *args, **more: (
        heard.append(cond), forward(self, x, t, cond, *args, **more))[1])  # fmt: skip
    vectors = {c: np.random.default_rng(i).normal(size=3) for i, c in enumerate(sum(STORIES.values(), ()))}
    text_of = lambda texts: np.array([vectors[t] for t in texts])  # noqa: E731
    clip = Judge({"sha256": "cc"}, lambda x: x.mean((1, 2)) - 100.0, text_of)
    monkeypatch.setattr(judges, "load", lambda folder, device: {"clip": clip})
    generator.max_frames = FRAMES  # as Generator.load does for sampling.seconds
    bench.bench(PROTOCOL, tmp_path / "out", generator=generator, requests=requests)
    assert all((c.layout.shot == 0).all() for c in heard)
    for row in (0, 1):  # of the batch: what each chunk read, in order
        told = [tuple(c.prompt[row].tolist()) for c in heard if len(c.prompt) == 2 and c.layout.position[0] > 0]
        assert list(dict.fromkeys(told)) == [(0,) * 3, (1,) * 3, (2,) * 3]
    made = open_set(tmp_path / "out" / "model")
    assert made.info["cuts"] == {"a": [], "b": []} and made.info["changes"] == {"a": STARTS, "b": STARTS}
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = {x["key"]: x for x in map(json.loads, (tmp_path / "out" / "videos.jsonl").read_text().splitlines())}
    for key, captions in STORIES.items():
        video = made.video(key)[0][::4]
        assert len(video) == 10
        scores = []
        for i, part in enumerate((video[:4], video[4:7], video[7:])):  # frames 0 to 12, to 24, to 36
            seen, text = part.mean((1, 2)) - 100.0, vectors[captions[i]]
            cosine = seen @ text / np.linalg.norm(seen, axis=1) / np.linalg.norm(text)
            scores.append(100 * cosine.clip(0))
            assert lines[key][f"clip_score_{i + 1}"] == pytest.approx(scores[-1].mean())
        assert lines[key]["clip_score"] == pytest.approx(np.concatenate(scores).mean())
        assert lines[key]["sca"] == pytest.approx(np.exp(-lines[key]["cuts"]))  # none was wanted
    cells = found["rows"]["model"]["metrics"]
    mean = np.mean([lines[k]["clip_score_3"] for k in STORIES])
    assert cells["clip_score_3"]["value"] == pytest.approx(mean) and "clip_score_4" not in cells
    assert found["made_by"]["frames"] == FRAMES and len(found["curves"]["model"]["times_s"]) >= 3
    assert "rot_step_imputed_deg" not in cells  # cameras that nobody asked for judge nothing
    assert found["unavailable"]["rot_step_imputed_deg"]["why"] == "no cameras"


def test_seconds_that_a_model_does_not_reach_are_refused_in_one_line(generator, requests, tmp_path):
    with pytest.raises(ValueError, match=r"test asks for 4.5 s, 37 frames, and student makes up to 13: .* streams"):
        bench.bench(PROTOCOL, tmp_path / "out", generator=generator, requests=requests)
    assert not (tmp_path / "out" / "model").exists()
