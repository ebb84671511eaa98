"""Arms and seeds side by side: every number told follows from the runs', and runs that do not go together are named."""

import json
import math
import re
import struct
import sys
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from vgr.metrics.statistics import crossed, discoveries
from vgr.report import arms, arms_page, arms_tables, readme, runs, wandb_runs
from vgr.report.runs import RunRecord

CLIPS = [f"clip{i}" for i in range(12)]


def made(arm, seed, loss, **more):
    """A run with a loss by clip."""
    told = {
        "source": f"runs/{arm}/seed{seed}", "arm": arm, "seed": seed, "config_sha256": arm, "config": {"arm": arm},
        "protocol": {"val/clips": 12}, "data": {"data.train": "t", "data.val": "v"},
        "weights": {"init_from": "nothing"}, "command": f"vgr-train experiments={arm} seed={seed}",
        "metrics": {"val/loss": float(np.mean(loss)), "bench/fvd": 100.0 + seed}, "samples": (80, 80),
        "clips": {"val/loss": dict(zip(CLIPS, map(float, loss)))},
        "curves": {"val/loss": [[40.0, 80.0], [seed, 2.0 * seed], [2.0, float(np.mean(loss))]]},
        "cost": {"hours": 2.0 * seed, "memory_gib": 1.0 + seed, "parameters": 2e6},
    }  # fmt: skip
    return RunRecord(**told | more)


def pair(gap=-0.3, seeds=(1, 2, 3)):
    """Two arms whose losses differ by `gap` and noise of seeds and clips."""
    rng = np.random.default_rng(0)
    base = {s: 1 + rng.normal() * 0.1 + rng.random(12) for s in seeds}
    other = {s: x + gap + rng.normal() * 0.02 + rng.normal(size=12) * 0.02 for s, x in base.items()}
    return [made("base", s, x) for s, x in base.items()] + [made("other", s, x) for s, x in other.items()]


def test_over_seeds_alone_it_is_students_interval_and_of_one_seed_it_tests_nothing():
    x = np.random.default_rng(1).normal(1, 1, 5)
    found, p = crossed(x[:, None])
    half = stats.t.ppf(0.975, 4) * x.std(ddof=1) / 5**0.5
    assert found[:3] == pytest.approx((x.mean(), x.mean() - half, x.mean() + half))
    assert p == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
    alone, p = crossed(x[None])
    assert alone[:3] == pytest.approx(found[:3]) and math.isnan(p)
    assert crossed([[2.0]])[0].value == 2 and math.isnan(crossed([[2.0]])[0].low)
    constant, p = crossed(np.full((3, 4), 0.1))
    assert constant[:3] == pytest.approx((0.1, 0.1, 0.1)) and p == 0 and crossed(np.zeros((3, 4)))[1] == 1
    assert crossed([[1, np.nan, 2], [2, 3, 3]])[0][3:5] == (2, 1)


@pytest.mark.parametrize("spread", [(1, 1, 1), (0.2, 2, 1), (0, 1, 1), (0.3, 1, 0.3)])
def test_an_interval_over_seeds_and_clips_holds_both_and_one_over_clips_does_not(spread):
    """Three seeds and sixteen clips: about 95 of 100 intervals hold the truth, whichever of both varies."""
    rng, hits, draws = np.random.default_rng(3), [], 600
    for _ in range(draws):
        seed, clip, rest = (rng.normal(size=s) * k for s, k in zip(((3, 1), (1, 16), (3, 16)), spread))
        found, p = crossed(seed + clip + rest)
        hits.append(found.low <= 0 <= found.high)
        assert (p < 0.05) == (not hits[-1])
    assert 0.91 < np.mean(hits) < 0.99


def test_lines_logged_again_after_a_restart_count_once():
    lines = [{"samples_seen": 8, "a": 1}, {"samples_seen": 16, "a": 2}, {"samples_seen": 16, "b": 5},
             {"samples_seen": 24, "a": 3}, {"samples_seen": 16, "a": 7}, {"samples_seen": 24, "b": 9}]  # fmt: skip
    once = [{"samples_seen": 8, "a": 1}, {"samples_seen": 16, "a": 7}, {"samples_seen": 24, "b": 9}]
    assert runs.merged(lines) == once


def test_an_arm_is_the_folder_below_runs():
    at = {"runs": "elsewhere/runs"}
    assert runs.arm_of("/x/runs/y/runs/study/arm_tiny/seed2", at) == "study/arm_tiny"
    assert runs.arm_of("moved/arm/seed2", at) == "arm"


def test_a_wandb_file_is_read_over_blocks_and_up_to_where_a_kill_cut_it(tmp_path):
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data = bytearray(b":W&B\xe1\xbe\x00")

    def add(kind, body):
        data.extend(struct.pack("<IHB", zlib.crc32(bytes([kind]) + body), len(body), kind) + body)

    def put(message):
        body = message.SerializeToString()
        if len(body) > 1000:  # over the end of a block
            room = 32768 - len(data) % 32768 - 7
            add(2, body[:room])
            add(4, body[room:])
        else:
            add(1, body)

    put(pb.Record(run=pb.RunRecord(run_id="abc", display_name="runs/s/a/seed1", job_type="train", project="vgr")))
    for i in range(3):
        row = {"samples_seen": 8 * i, "note": "x" * (40000 if i == 1 else 3)}
        items = [pb.HistoryItem(nested_key=[k], value_json=json.dumps(v)) for k, v in row.items()]
        put(pb.Record(history=pb.HistoryRecord(item=items)))
    path = tmp_path / "run-abc.wandb"
    path.write_bytes(data)
    told = wandb_runs._start(path)
    assert told["name"] == "runs/s/a/seed1" and [r["samples_seen"] for r in told["rows"]] == [0, 8, 16]
    path.write_bytes(data[:-3])
    assert [r["samples_seen"] for r in wandb_runs._start(path)["rows"]] == [0, 8]
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="no file of Weights & Biases"):
        wandb_runs._start(path)


def test_differences_are_paired_by_seed_and_clip_and_corrected_as_one_family():
    found = arms.compare(pair(), ["val/loss", "bench/fvd"])
    records = pair()
    value_SC = [np.array([[r.clips["val/loss"][k] for k in CLIPS] for r in records[i : i + 3]]) for i in (0, 3)]
    loss, fvd = found["differences"]
    told, p = crossed(value_SC[1] - value_SC[0])
    assert (loss["value"], loss["low"], loss["high"]) == pytest.approx(told[:3]) and loss["p"] == pytest.approx(p)
    assert (loss["seeds"], loss["count"]) == (3, 12) and loss["verdict"] == "better"
    assert fvd["value"] == 0 and fvd["p"] == 1 and fvd["count"] == 1 and fvd["verdict"] == ""
    assert [c["stands"] for c in found["differences"]] == discoveries([loss["p"], fvd["p"]]).tolist()
    assert found["arms"][0]["metrics"]["val/loss"]["value"] == pytest.approx(value_SC[0].mean())
    assert found["arms"][1]["cost"] == {"hours": 4.0, "memory_gib": 4.0, "parameters": 2.0}
    curve = found["arms"][0]["curves"]["val/loss"]
    assert curve["samples"] == [40, 80] and curve["hours"] == [2, 4]
    means = [r.metrics["val/loss"] for r in records[:3]]
    assert [curve["low"][1], curve["high"][1]] == pytest.approx([min(means), max(means)], rel=1e-5)
    assert found["settings"] == {"arm": {"base": "base", "other": "other"}} and found["notes"] == []


def test_worse_is_told_by_direction_and_seeds_that_one_arm_lacks_are_left_out():
    gain = "val/camera_gain"
    records = [replace(r, metrics={gain: r.metrics["val/loss"]}, clips={gain: r.clips["val/loss"]}) for r in pair()]
    (gain,) = arms.compare(records)["differences"]
    assert gain["metric"] == "val/camera_gain" and gain["verdict"] == "worse"
    fewer = arms.compare(records[:-1])
    assert fewer["differences"][0]["seeds"] == 2 and "Not of the seeds of base: other" in fewer["notes"][0]
    single = arms.compare([records[0], records[3]])
    assert single["differences"][0]["p"] is None and not single["differences"][0]["stands"]
    assert single["notes"][0].startswith("One seed only: base, other")


def test_a_run_that_diverged_is_told_and_not_averaged():
    records = pair()
    for i in (4, 5):
        records[i] = replace(records[i], diverged=3 * i, metrics={}, clips={}, curves={}, samples=(24, 80))
    found = arms.compare(records)
    assert found["arms"][1]["diverged"] == {"2": 12, "3": 15} and found["differences"][0]["seeds"] == 1
    assert "| 3, 2 diverged at step 12 to 15 |" in arms_tables.markdown(found | {"published": None})
    records[3] = replace(records[3], diverged=1, metrics={})
    found = arms.compare(records, ["val/loss"])
    assert found["arms"][1]["metrics"] == {} and found["differences"] == []
    assert re.search(r"\| other \| 3, 3 diverged at step 1 to 15 \| – \|", arms_tables.markdown(found))


@pytest.mark.parametrize(("change", "told"), [
    ({"protocol": {"val/clips": 64}}, "of different protocol: val/clips is 12 and 64"),
    ({"data": {"data.train": "t", "data.val": "w"}}, "of different data: data.val is v and w"),
    ({"weights": {"init_from": "abc"}}, "of different weights: init_from is nothing and abc"),
    ({"samples": (40, 80)}, "other/seed2 has seen 40 of 80 samples; `vgr-train experiments=other seed=2` goes on"),
    ({"config_sha256": "x", "config": {"arm": "other", "lr": 2}}, "are seeds of other with different settings: lr"),
])  # fmt: skip
def test_runs_that_do_not_go_together_are_named_unless_they_are_wanted_anyway(change, told):
    records = pair()
    records[4] = replace(records[4], **change)
    with pytest.raises(ValueError) as caught:
        arms.compare(records)
    assert told in str(caught.value) and "runs/other/seed2" in str(caught.value) and "anyway=true" in str(caught.value)
    assert told in arms.compare(records, anyway=True)["notes"][0]


def test_weights_may_differ_between_seeds_but_not_between_arms():
    records = [replace(r, weights={"init_from": f"of seed {r.seed}"}) for r in pair()]
    assert arms.compare(records)["notes"] == []


@pytest.mark.parametrize("anyway", [False, True])
def test_a_run_without_results_is_named_with_the_command_that_makes_them(anyway):
    records = pair()
    records[4] = replace(records[4], metrics={"val/loss": 1.0})
    with pytest.raises(ValueError, match="runs/other/seed2 has no bench/fvd; `vgr-bench checkpoint=runs/other/seed2 "):
        arms.compare(records, ["val/loss", "bench/fvd"], anyway=anyway)
    records = [replace(r, metrics={}) for r in records]
    with pytest.raises(ValueError, match="no result that all of them have; `vgr-train experiments=base seed=1`"):
        arms.compare(records, anyway=anyway)


def test_data_that_is_not_known_is_said_and_a_run_stands_once():
    records = pair()
    records[1] = replace(records[1], data={"data.train": "t"})
    assert "data.val of runs/base/seed2" in arms.compare(records)["notes"][0]
    logged = [replace(r, wandb_id=r.source) for r in pair()]
    assert runs.once([*logged, *(replace(r, source="offline") for r in logged)]) == logged
    with pytest.raises(ValueError, match="runs/base/seed1 and elsewhere are both seed 1 of base"):
        runs.once([*logged, replace(logged[0], source="elsewhere", wandb_id="another")])


def test_the_page_is_offline_escaped_sorted_and_holds_the_tables_numbers(tmp_path):
    records = [replace(r, arm=r.arm.replace("other", "<b>o_t & 50 %")) for r in pair()]
    found = arms.compare(records, title="<script>alert(1)</script>") | {"published": None}
    html = arms_page.write(tmp_path, found, "kicker").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", html) and "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "") and "<b>o_t" not in html and "<script>alert" not in html
    rows = re.findall(r"<tr>(.*?)</tr>", html[html.index("<h2>Measures") :], re.S)
    assert "&lt;b&gt;o_t" in rows[1] and "better" in rows[1] and ">base" in rows[2]  # the best first
    assert html.count('class="band run0"') == html.count('class="band run1"') == 2  # over samples, over hours
    assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(found))
    cell = found["arms"][0]["metrics"]["val/loss"]
    for text in (html, (tmp_path / "table.md").read_text(), (tmp_path / "table.tex").read_text()):
        assert f"{cell['value']:.1f}"[:3] in text
    tex = (tmp_path / "table.tex").read_text()
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {6} and r"<b>o\_t \& 50 \%" in tex and r"\toprule" in tex
    again = arms_page.write(tmp_path / "again", found, "kicker").read_text()
    assert again == html


def study(folder, metrics=("val/loss", "bench/fvd"), seeds=(1, 2, 3)):
    names = (("base", {"fvd": 3.5}), ("other", {"fvd": 2.0}), ("third", None))
    made_arms = [SimpleNamespace(name=n, label=f"the {n}", published=p) for n, p in names]
    own = folder / "experiments" / "pair"
    own.mkdir(parents=True, exist_ok=True)
    told = {"columns": {"fvd": {"label": "FVD", "unit": "", "better": "lower", "unlike": "other clips"},
                        "rot": {"label": "Rotation", "unit": "°", "better": "lower", "unlike": ""}},
            "source": "A paper, table 4", "conditions": "Five seconds.", "doubt": "Copied."}  # fmt: skip
    (folder / "benchmarks" / "references").mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks" / "references" / "paper.json").write_text(json.dumps(told))
    return SimpleNamespace(name="pair", folder=own, question="Which?", metrics=metrics, seeds=seeds, arms=made_arms,
                           reference={"name": "paper", "table": "t"})  # fmt: skip


def test_a_studys_readme_follows_from_its_results_alone(tmp_path):
    pair_study = study(tmp_path)
    path = pair_study.folder / "README.md"
    path.write_text(f"# Pair\n\n{readme.MARKS[0]}\n{readme.MARKS[1]}\n\nLearnt: much.\n")
    assert readme.table(pair_study, None) == readme.table(pair_study, {"runs": []}) == "Not run yet.\n"
    readme.write(pair_study, readme.merge(pair_study, [], pair()[3:] + pair()[:3]))
    text, results = path.read_text(), readme.read(pair_study)
    assert readme.between(text) == readme.table(pair_study, results) and text.endswith("\n\nLearnt: much.\n")
    assert [(r["arm"], r["seed"]) for r in results["runs"]] == [(a, s) for a in ("base", "other") for s in (1, 2, 3)]
    assert "| the base | 3 |" in text and "**better**" in text and "Published: FVD ↓" in text and "Rotation" not in text
    assert "A paper, table 4. Five seconds. Copied. Not the same numbers: FVD: other clips." in text
    assert "Not run yet, by arm and seed: third 1, third 2, third 3." in text
    assert all(run["config"] == {} for run in results["runs"])
    readme.write(pair_study, readme.records(results))
    assert path.read_text() == text and readme.read(pair_study) == results


def test_seeds_of_another_day_are_added_and_a_seed_that_is_there_anew_replaces_the_old(tmp_path):
    pair_study, records = study(tmp_path), pair()
    kept = readme.merge(pair_study, [], records[:4])
    anew = replace(records[0], metrics={"val/loss": 9.0, "bench/fvd": 1.0}, source="anew")
    both = readme.merge(pair_study, kept, [anew, *records[4:]])
    assert [(r.arm, r.seed) for r in both] == [(r.arm, r.seed) for r in records] and both[0].source == "anew"
    assert readme.merge(study(tmp_path, seeds=(2,)), kept, []) == [kept[1]]


def test_a_readme_without_marks_and_damaged_results_are_refused(tmp_path):
    pair_study = study(tmp_path)
    (pair_study.folder / "README.md").write_text("# Pair\n")
    with pytest.raises(ValueError, match="has no <!-- vgr-compare -->"):
        readme.write(pair_study, pair())
    assert readme.read(pair_study) is None
    (pair_study.folder / "results.json").write_text('{"format": 1,')
    with pytest.raises(ValueError, match="results.json is damaged, no JSON"):
        readme.read(pair_study)


def test_a_report_needs_the_extra_and_runs_that_were_logged(monkeypatch):
    from vgr.report import wandb_report

    found = arms.compare(pair()) | {"published": None}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
        with pytest.raises(ValueError, match=r"pip install 'vgr\[report\]'"):
            wandb_report.publish(found, "team/vgr")
    pytest.importorskip("wandb_workspaces")
    with pytest.raises(ValueError, match="W&B has no runs/base/seed1, .*; train with logger=wandb"):
        wandb_report.publish(found, "team/vgr")
