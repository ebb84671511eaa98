"""Two results of one protocol side by side: every number told is one of theirs, or follows from them by scipy alone."""

import itertools
import json
import re
import shutil
from html import unescape

import numpy as np
import pytest
from scipy import stats
from test_bench import FPS, FRAMES, PROTOCOL, World, shift_estimator, turning

from vgr import bench as bench_
from vgr import compare as command_
from vgr.data.video import encode_video
from vgr.report import compare, measure, page
from vgr.report.curves import Line, chart, steps
from vgr.report.sets import open_set

CLIPS, A, B = 8, "<i>slant</i> & co", "beta"
KEYS = [f"wall_{i:02d}" for i in range(CLIPS)]


def worsened(world, folder, name, noise, device, seconds):
    """True videos with growing noise, as somebody hands over a model's, and timings of two requests in 12 chunks."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(name))
    for key, video in zip(KEYS, world.videos):
        sd_F = (noise + 3 * rng.random()) * np.linspace(1, 2, len(video))
        made = video + sd_F[:, None, None, None] * rng.normal(size=video.shape)
        (folder / f"{key}.mp4").write_bytes(encode_video(made.clip(0, 255).astype(np.uint8), FPS))
    took = np.cumsum(seconds * (1 + rng.random((2, 12))), axis=1)
    timings = [{"wall_s": t[-1], "frames": 25, "videos": 1, "arrivals": [[s, 2] for s in t], "held_bytes": [1] * 12}
               for t in took.tolist()]  # fmt: skip
    made_by = {"name": name, "weights": f"{name} weights", "sampling": {"steps": 4}, "device": device}
    (folder / "set.json").write_text(json.dumps({"made_by": made_by, "timings": timings, "fps": FPS}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """runs/a and runs/b measured as the command does, from sets/a and sets/b."""
    root, world = tmp_path_factory.mktemp("compared"), World(12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "pose_values", shift_estimator)
        for run, name, noise, device, seconds in (("a", A, 6, "one GPU", 0.1), ("b", B, 9, "another GPU", 0.2)):
            worsened(world, root / "sets" / run, name, noise, device, seconds)
            protocol = {**PROTOCOL, "clips": CLIPS, "reference": 8}
            bench_.bench(protocol, root / "runs" / run, videos=open_set(root / "sets" / run), shards=world)
    return root


@pytest.fixture(scope="module")
def both(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    html = compare.write([root / "runs" / "a", root / "runs" / "b"], out).read_text()
    return html, json.loads((out / "compare.json").read_text())


def read(root, run):
    folder = root / "runs" / run
    lines = map(json.loads, (folder / "videos.jsonl").read_text().splitlines())
    return json.loads((folder / "results.json").read_text()), {x["key"]: x for x in lines if x["row"] == "model"}


def rows_of(html, heading):
    """Cells' texts of the table after a heading."""
    table = html[html.index(heading) :].split("<tbody>")[1].split("</tbody>")[0]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)]
    return [[" ".join(unescape(re.sub(r"<[^>]+>", " ", c)).split()) for c in row] for row in cells]


def test_the_table_holds_each_results_own_numbers(root, both):
    html, told = both
    assert [run["label"] for run in told["runs"]] == [A, B] and told["clips"] == KEYS
    rows = rows_of(html, "<h2>Measures</h2>")
    for run, row in zip("ab", rows, strict=True):
        found = read(root, run)[0]["rows"]["model"]["metrics"]
        ours = told["runs"]["ab".index(run)]["metrics"]
        assert {"psnr_db", "ssim", "drift", "fd_clipstats48", "frames_per_s"} <= set(ours)
        assert all(cell == found[name] for name, cell in ours.items())
        assert row[1] == str(CLIPS)
        for name, text in zip(told["metrics"], row[2:], strict=True):
            assert text.startswith(page.figure(found[name])) and page.interval(found[name]) in text, name
    assert "PSNR ↑" in html and "Drift ↓" in html


def test_differences_are_scipys_and_the_family_is_corrected(root, both):
    html, told = both
    (_, a), (_, b) = read(root, "a"), read(root, "b")
    assert {c["metric"] for c in told["differences"]} >= {"psnr_db", "ssim", "motion_level", "stagnation"}
    for c in told["differences"]:
        d = np.array([b[k][c["metric"]] - a[k][c["metric"]] for k in told["clips"]])
        assert c["value"] == pytest.approx(d.mean()) and c["count"] == CLIPS
        if np.ptp(d):
            rng = np.random.default_rng(0)
            interval = stats.bootstrap((d,), np.mean, n_resamples=9999, method="BCa", rng=rng).confidence_interval
            assert (c["low"], c["high"]) == pytest.approx(tuple(interval))
        flips = np.array(list(itertools.product((1, -1), repeat=CLIPS))) @ d / CLIPS
        assert c["p"] == pytest.approx((np.abs(flips) >= abs(d.mean()) - 1e-12).mean())
        ranks = stats.rankdata(np.abs(d[d != 0]))
        assert c["rank_biserial"] == pytest.approx((np.sign(d[d != 0]) * ranks).sum() / max(ranks.sum(), 1))
    # Benjamini and Hochberg by hand: the largest k whose p is at most 0.05 k / K, and all smaller p.
    p = np.sort([c["p"] for c in told["differences"]])
    limit = max((x for k, x in enumerate(p, 1) if x <= 0.05 * k / len(p)), default=-1)
    assert [c["stands"] for c in told["differences"]] == [c["p"] <= limit for c in told["differences"]]
    verdicts = {c["metric"]: c["verdict"] for c in told["differences"]}
    assert verdicts["psnr_db"] == verdicts["ssim"] == "worse" and "" in verdicts.values()
    rows = rows_of(html, "<h3>Differences to")
    assert [row[-1] for row in rows] == [c["verdict"] for c in told["differences"]]
    assert [row[3] for row in rows] == [str(CLIPS)] * len(rows)
    psnr = rows_of(html, "<h2>Measures</h2>")[1][2 + list(told["metrics"]).index("psnr_db")]
    assert psnr.endswith("worse")
    assert "fd_clipstats48" in told["untested"] and "Of a whole set, without a value for every video" in html


def test_a_smaller_p_is_needed_in_a_larger_family(root):
    """0.04 alone stands; beside a test that does not, it falls."""
    runs = [compare._read(root / "runs" / run) for run in "ab"]
    keys = runs[0].results["clips"]
    for run, sign in zip(runs, (0.0, 1.0)):
        for i, key in enumerate(keys):
            run.values[key].update(one=sign * (i + 1) if i else sign * -4.2, none=sign * (-1) ** i * (i + 1))
        for name in ("one", "none"):
            run.results["metrics"][name] = run.results["metrics"]["psnr_db"]
            run.results["rows"]["model"]["metrics"][name] = {"value": 0.0}
    (alone,) = compare.differences(runs, keys, ["one"])
    assert 0.025 < alone["p"] <= 0.05 and alone["stands"] and alone["verdict"] == "better"
    family = compare.differences(runs, keys, ["one", "none"])
    assert family[0]["p"] == alone["p"] and [c["stands"] for c in family] == [False, False]
    assert [c["verdict"] for c in family] == ["", ""]


def test_units_are_averaged_and_metrics_that_one_lacks_are_not_tested(root, tmp_path):
    shutil.copytree(root, tmp_path / "x")
    folders = [tmp_path / "x" / "runs" / run for run in "ab"]
    info = json.loads((tmp_path / "x" / "sets" / "b" / "set.json").read_text())
    info["units"] = {key: f"scene {i // 2}" for i, key in enumerate(KEYS)}
    (tmp_path / "x" / "sets" / "b" / "set.json").write_text(json.dumps(info))
    found = json.loads((folders[1] / "results.json").read_text())
    del found["rows"]["model"]["metrics"]["ssim"]  # its check failed there, say; videos.jsonl has its values
    found["clips"], found["frames"] = KEYS[:6], 20
    (folders[1] / "results.json").write_text(json.dumps(found))
    for key in KEYS:  # and its videos went another way
        np.savez(tmp_path / "x" / "sets" / "b" / f"{key}.cameras.npz", c2w=turning(np.linspace(0, 2, FRAMES)),
                 intrinsics=np.ones((FRAMES, 4)))  # fmt: skip
    html = compare.write(folders, tmp_path / "out").read_text()
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {c["count"] for c in told["differences"]} == {3} and "no p is below 5 %" in html
    assert not [c for c in told["differences"] if c["metric"] == "ssim"] and "ssim" not in told["untested"]
    assert len(told["clips"]) == 6 and [run["clips"] for run in told["runs"]] == [CLIPS, 6]
    assert "Not measured alike, and differences are of that too: frames 25 / 20." in html
    assert html.count(f"Camera path from above: {B}") == 3 == html.count("Camera path from above: &lt;i&gt;")
    assert 'data-seconds="2.5000"' in html and html.count('class="here') == 6  # 20 frames at 8 a second


def test_clips_are_picked_by_quantile_and_videos_stand_in_step(root, both):
    html, told = both
    (_, a), (_, b) = read(root, "a"), read(root, "b")
    ranked = sorted(told["clips"], key=lambda k: b[k]["psnr_db"] - a[k]["psnr_db"])
    picked = {x["at"]: x["key"] for x in told["shown"]["clips"]}
    assert picked == {"p5": ranked[0], "p50": ranked[4], "p95": ranked[7]}
    assert told["shown"]["by"] == f"PSNR, {B} minus {A}" and f"PSNR, {B} minus &lt;i&gt;slant" in html
    assert html.count("data:video/mp4;base64,") == 3 * 3  # the true video once, and both
    assert html.count("Camera path from above") == 3 and 'class="controls"' in html


def test_curves_latencies_and_speed_against_quality(root, both):
    html, told = both
    for style in ("run0", "run1"):
        assert html.count(f'class="band {style}"') == 4 and html.count(f'class="line {style}" points') == 4 + 1
        assert html.count(f'class="point {style}"') == 1
    assert html.count('class="line truth"') == 4
    for run in told["runs"]:
        assert len(run["chunk_latencies_s"]) == 2 * 10  # 12 arrivals: 11 intervals, the first left out
    set_ = json.loads((root / "sets" / "b" / "set.json").read_text())
    assert told["runs"][1]["chunk_latencies_s"][0] == pytest.approx(
        set_["timings"][0]["arrivals"][2][0] - set_["timings"][0]["arrivals"][1][0])  # fmt: skip
    assert "PSNR, dB, higher is better" in html and "frames a second, higher is better" in html
    assert "Speeds are not comparable, since these differ or are not known: device one GPU / another GPU." in html
    assert rows_of(html, "<h2>Speed</h2>")[0][2:] == ["one GPU", "48×32", "25", "4"]
    alone = (root / "runs" / "a" / "report.html").read_text()
    assert "<h2>Speed</h2>" in alone and "Share of chunks" in alone


def test_few_chunks_have_no_distribution(root):
    assert page.speed({"model": np.ones(9)}, {"model": "Model"})["charts"] == [""]
    line = steps([3.0, 1.0, 2.0, 2.0], "model")
    assert line.x == [1, 1, 2, 2, 2, 2, 3, 3] and line.y == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]
    near = [Line([10.0 + i / 100], [5.0], f"run{i}", [4.0], [6.0], label=f"r{i} <b>") for i in range(8)]
    svg = chart(near, "x", "y")
    heights = [float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="\w+">r\d', svg)]
    assert len(heights) == 8 and min(np.diff(heights)) >= 12 and "<b>" not in svg and "polyline" not in svg


def test_the_page_is_offline_escaped_and_deterministic(root, both, tmp_path):
    html, _ = both
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", html) and "default-src 'none'" in html
    assert "http://" not in html and "https://" not in html and "url(" not in html
    assert "<i>" not in html and "&lt;i&gt;slant&lt;/i&gt; &amp; co" in html
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; a wall" in html
    again = compare.write([root / "runs" / "a", root / "runs" / "b"], tmp_path)
    assert again.read_text() == html and sorted(p.name for p in tmp_path.iterdir()) == ["compare.html", "compare.json"]


def test_a_run_beside_itself_differs_in_nothing(root, tmp_path):
    html = compare.write([root / "runs" / "b"] * 2, tmp_path).read_text()
    told = json.loads((tmp_path / "compare.json").read_text())
    assert [run["label"] for run in told["runs"]] == ["beta (1)", "beta (2)"]
    for c in told["differences"]:
        assert c["value"] == c["low"] == c["high"] == 0 and c["p"] == 1 and not c["stands"] and c["verdict"] == ""
    assert told["shown"]["by"] == "PSNR of beta (1)" and told["notes"] == {"measures": "", "speed": ""}
    assert 'class="mark' not in html and "not comparable" not in html


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(("spoil", "told"), [
    (lambda x: (x / "runs/b/results.json").unlink(), "b holds no results.json; run `vgr-bench checkpoint=<run>` or"),
    (lambda x: shutil.rmtree(x / "runs/b"), "runs/b holds no results.json"),
    (lambda x: (x / "runs/b/results.json").write_text('{"format": 1, "rows'), "results.json is damaged, no JSON"),
    (lambda x: (x / "runs/b/results.json").write_bytes(b"\xff\xfe"), "runs/b/results.json is damaged, no JSON"),
    (lambda x: (x / "runs/b/results.json").write_text("[]"), "results.json (list) is no whole result of format 1"),
    (lambda x: changed(x / "runs/b/results.json", format=2), "results.json (format 2) is no whole result of format 1"),
    (lambda x: (x / "runs/b/videos.jsonl").write_text('{"row": "model", "ke'), "videos.jsonl has no whole line of w"),
    (lambda x: (x / "runs/b/videos.jsonl").unlink(), "videos.jsonl has no whole line of wall_00"),
    (lambda x: (x / "sets/b/wall_03.mp4").unlink(), "sets/b/wall_03.mp4, which is gone"),
    (lambda x: (x / "sets/b/set.json").write_text("{"), "set.json is no JSON"),
    (lambda x: (x / "sets/b/timings.json").write_text("{"), "timings.json is damaged, no JSON"),
    (lambda x: changed(x / "runs/b/results.json", protocol={"name": "other", "sha256": "1" * 64}),
     f"runs/a is by test (sha256 {'0' * 64})"),
    (lambda x: changed(x / "runs/b/results.json", protocol={"name": "other", "sha256": "1" * 64}),
     f"runs/b is by other (sha256 {'1' * 64})"),
    (lambda x: changed(x / "runs/b/results.json", clips=[]), "no clip is in all of them"),
    (lambda x: changed(x / "runs/b/truth/set.json", fingerprint="b"), "are of other data under the same names"),
])  # fmt: skip
def test_results_that_do_not_go_together_are_refused_in_one_line(root, tmp_path, spoil, told):
    shutil.copytree(root, tmp_path / "x")
    spoil(tmp_path / "x")
    with pytest.raises(ValueError) as caught:
        compare.write([tmp_path / "x" / "runs" / run for run in "ab"], tmp_path / "out")
    assert told in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def run_command(words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["vgr-compare", *words])
    command_.main()


def test_the_command_writes_both_files_where_it_says(root, tmp_path, monkeypatch, capsys, both):
    run_command([f"runs=[{root}/runs/a,{root}/runs/b]"], tmp_path, monkeypatch)
    path = tmp_path / "runs" / "bench" / "compare" / "test" / "compare.html"
    assert capsys.readouterr().out.strip() == str(path.relative_to(tmp_path)) and path.read_text() == both[0]
    assert json.loads(path.with_suffix(".json").read_text()) == both[1]


@pytest.mark.parametrize(("words", "told"), [
    (["runs=[{}/runs/a]"], "give 2 to 8 folders"),
    (["runs={}/runs/a"], "give 2 to 8 folders"),
    (["runs=[{0}/runs/a,{0}/runs/b]", "study=camera_encoding"], "takes no study"),
    (["runs=[{0}/runs/a,{0}/runs/b]", "metrics=[val/loss]", "publish=true"], "takes no metrics, publish"),
    (["runs=[{}/runs/a,nowhere]"], "runs/a holds benchmark results and nowhere none"),
    (["runs=[nowhere]"], "nowhere holds no run of vgr-train, no W&B file of one and no results.json"),
    (["runs=[]"], "give runs=[folder,...], study=<name> or wandb="),
    (["study=camera_encodin"], "did you mean camera_encoding?"),
    (["sweep=true"], "give study=<name> alone"),
    (["study=camera_encoding", "metrics=[val/loss]"], "study=camera_encoding has its own metrics"),
    (["stdy=x"], "did you mean `study`?"),
])  # fmt: skip
def test_mistakes_end_in_one_line_and_code_2_and_write_nothing(root, tmp_path, monkeypatch, capsys, words, told):
    with pytest.raises(SystemExit) as ended:
        run_command([word.format(root) for word in words], tmp_path, monkeypatch)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and told in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
