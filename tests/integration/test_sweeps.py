"""A sweep of trainings one of which diverges: that is a result, and the others are trained."""

import json

from small_training import CODEC, make_project, train, write_shards

from vgr.models.codec import CosineCodec


def test_a_diverged_run_says_at_which_step_and_the_next_is_trained(tmp_path):
    folder = make_project(tmp_path)
    write_shards(folder / "bad", "train", 40, CosineCodec(**CODEC).fingerprint, poison=range(40))
    write_shards(folder / "bad", "val", 8, CosineCodec(**CODEC).fingerprint)
    done = train(folder, "hydra.mode=MULTIRUN", "shards=bad,shards", "training.max_samples=16")
    assert done.returncode == 3, done.stderr[-2000:]
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("vgr-train: error: ")]
    assert "experiments=mini shards=bad training.max_samples=16: training stopped at step 1" in told
    bad, good = (next((folder / "runs").glob(f"*shards-{name}+*")) / "seed1" for name in ("bad", "shards"))
    (line,) = map(json.loads, (bad / "metrics.jsonl").read_text().splitlines())
    assert line["diverged"] == 1 and line["samples_seen"] == 0
    assert json.loads((good / "validation.json").read_text())["summary"]["val/clips"] == 8
    again = train(folder, "shards=bad", "training.max_samples=16")
    assert again.returncode == 3 and len((bad / "metrics.jsonl").read_text().splitlines()) == 1
