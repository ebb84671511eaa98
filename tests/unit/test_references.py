"""Published numbers the report prints beside ours: in form, tied to metrics of ours, and one table true to itself."""

import json
import math
from pathlib import Path

import pytest

from vgr.metrics import vbench

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks/references").glob("*.json"))
OURS = json.loads((ROOT / "vgr/report/metrics.json").read_text(encoding="utf-8"))["metrics"]
SCORED = [name for name, (_, _, weight) in vbench.RANGES.items() if weight is not None]


def read(path):
    def unique(pairs):
        assert len(dict(pairs)) == len(pairs), f"a key stands twice among {[k for k, _ in pairs]}"
        return dict(pairs)

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)


def test_all_published_tables_are_there():
    there = {f.stem for f in FILES}
    assert there >= {"camera_encoding", "frame_rate", "multi_shot", "sana_wm_bench", "warp_as_history"}


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.stem)
def test_every_file_says_what_its_numbers_are(path):
    found = read(path)
    assert set(found) == {"name", "title", "source", "conditions", "doubt", "columns", "rows"}
    assert found["name"] == path.stem
    assert all(isinstance(found[k], str) for k in ("title", "source", "conditions", "doubt"))
    assert found["title"] and found["source"] and found["conditions"]
    for name, column in found["columns"].items():
        assert set(column) - {"scale"} == {"label", "unit", "better", "ours", "unlike"}, name
        assert all(isinstance(column[k], str) for k in ("label", "unit", "unlike")) and column["label"], name
        assert column["better"] in ("higher", "lower", ""), name
        assert column["ours"] in OURS or (column["ours"] is None and column["unlike"]), name
        assert column.get("scale", 2) > 1, name  # left out where 1


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.stem)
def test_every_row_is_one_system_under_conditions_of_its_own(path):
    found, seen, used = read(path), set(), set()
    for row in found["rows"]:
        assert set(row) == {"table", "system", "conditions", "values"}
        assert row["table"] and row["system"] and row["values"]
        assert all(isinstance(x, str | int | float) for x in row["conditions"].values())
        key = (row["table"], row["system"], json.dumps(row["conditions"], sort_keys=True))
        assert key not in seen
        seen.add(key)
        used |= set(row["values"])
        assert all(type(x) in (int, float) and math.isfinite(x) for x in row["values"].values()), key
    assert used == set(found["columns"])


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.stem)
def test_a_column_is_better_the_way_ours_is(path):
    for name, column in read(path)["columns"].items():
        way = OURS[column["ours"]]["better"] if column["ours"] else ""
        assert way in ("", column["better"]), name


def test_published_overall_is_our_quality_of_the_published_dimensions():
    found = read(ROOT / "benchmarks/references/sana_wm_bench.json")
    of = {c["ours"]: (k, c.get("scale", 1)) for k, c in found["columns"].items()}
    for row in found["rows"]:
        ours = {name: row["values"][of[name][0]] / of[name][1] for name in SCORED}
        assert vbench.quality(ours) == pytest.approx(row["values"][of["vbench_quality"][0]], abs=0.02), row["system"]


def test_quality_lost_is_first_less_last():
    rows = [r["values"] for r in read(ROOT / "benchmarks/references/sana_wm_bench.json")["rows"]]
    whole = [v for v in rows if "iq_first" in v]
    assert len(whole) == 12
    for v in whole:
        assert v["iq_first"] - v["iq_last"] == pytest.approx(v["iq_drop"], abs=0.0151)  # three rounded numbers


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/protocols").glob("*.json")), ids=lambda f: f.stem)
def test_a_protocol_names_tables_and_requests_that_are_there(path):
    protocol = json.loads(path.read_text())
    assert protocol["name"] == path.stem
    if told := protocol.get("published"):
        rows = read(ROOT / "benchmarks/references" / f"{told['name']}.json")["rows"]
        assert any(row["table"] == told["table"] for row in rows)
    if told := protocol.get("requests"):
        assert (ROOT / told).is_file()


def test_the_hundred_stories_are_five_categories_whose_subjects_return():
    from vgr.report.requests import read_requests

    path = ROOT / "benchmarks/prompts/multi_shot_v1.json"
    prompts = json.loads(path.read_text(encoding="ascii"))["prompts"]
    kinds = [p["category"] for p in prompts]
    assert len(prompts) == 100 and {kinds.count(k) for k in set(kinds)} == {20} and len(set(kinds)) == 5
    shots = [shot for p in prompts for shot in p["shots"]]
    assert len(set(shots)) == len(shots) and all(15 <= len(s.split()) <= 45 for s in shots)
    for p in prompts:
        assert 3 <= len(p["shots"]) <= 5 and p["returns"]
        assert all(0 <= a < b < len(p["shots"]) for a, b in p["returns"])
        assert p["category"] != "long_gap" or p["returns"] == [[0, 4]]
    assert [r.key for r in read_requests(path)] == [p["key"] for p in prompts]
