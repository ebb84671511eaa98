"""Checkpoints: what is read back, what survives a crash at any byte, what is refused and how."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from vgr.training import checkpoints, optim, saving


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def adamw(model):
    return optim.adamw(model, 1e-2, 0.1, (0.9, 0.99), 1e-8)


def parts(model, optimizer):
    return {
        "weights": model.state_dict(),
        "ema": {k: v + 1 for k, v in model.state_dict().items()},
        "optimizer": checkpoints.optimizer_tensors(model, [optimizer]),
    }


def save(folder, step, model, optimizer, **state):
    return saving.save(folder, step, parts(model, optimizer), {"samples_seen": step, **state}, {"format": 1})


def test_restored_training_goes_on_bit_for_bit(tmp_path):
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, 3)
    path = save(tmp_path, 3, model, optimizer)
    other = network(seed=9)
    fresh = adamw(other)
    ema = {k: torch.zeros_like(v) for k, v in other.state_dict().items()}
    checkpoints.restore(path, other.state_dict(), ema, other, [fresh])
    assert all(torch.equal(ema[k], v + 1) for k, v in model.state_dict().items())
    train(model, optimizer, 4, seed=1)
    train(other, fresh, 4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert checkpoints.read_state(path)["samples_seen"] == 3
    read = checkpoints.read_weights(path, "ema")
    assert read.keys() == ema.keys() and torch.equal(read["0.bias"], ema["0.bias"])


def test_parameters_without_gradient_have_no_state(tmp_path):
    model = network()
    optimizer = adamw(model)
    model[0](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = save(tmp_path, 1, model, optimizer)
    other = network(1)
    fresh = adamw(other)
    checkpoints.restore(path, other.state_dict(), {k: v.clone() for k, v in other.state_dict().items()}, other, [fresh])
    assert not fresh.state.get(other[2].weight) and fresh.state[other[0].weight]["step"] == 1


def test_no_pickle_and_a_manifest_of_every_file(tmp_path):
    model = network()
    path = save(tmp_path, 1, model, adamw(model))
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert all(f.endswith((".safetensors", ".json")) for f in files)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json"}


def test_the_newest_are_kept(tmp_path):
    model = network()
    optimizer = adamw(model)
    for step in range(1, 6):
        save(tmp_path, step, model, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000004", "step_00000005"]


def test_the_best_validated_is_kept_and_can_be_named(tmp_path):
    model = network()
    optimizer = adamw(model)
    for step, loss in enumerate([None, 0.5, 0.4, 0.6, 0.4, None, 0.7], 1):
        save(tmp_path, step, model, optimizer, validation_loss=loss)
    kept = [f"step_0000000{i}" for i in (3, 6, 7)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest", *kept]
    assert checkpoints.resolve(tmp_path / "best").name == kept[0] and checkpoints.resolve(tmp_path).name == kept[2]
    save(tmp_path, 8, model, optimizer, validation_loss=0.3)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000007", "step_00000008"]
    # Continued from an earlier one, what came after it in the other attempt is not this one's best.
    checkpoints.point_latest(tmp_path / "step_00000007")
    assert checkpoints.validation_loss(checkpoints.best(tmp_path)) == 0.7


def test_what_a_killed_run_left_half_written_goes_with_the_next_save(tmp_path):
    model = network()
    for name in (".saving_step_00000009", ".removing_step_00000001"):
        (tmp_path / name / "weights").mkdir(parents=True)
    save(tmp_path, 2, model, adamw(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000002"]


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written before it is opened."""
    opened, write = threading.Event(), saving.dcp.save
    monkeypatch.setattr(saving.dcp, "save", lambda *a, **k: opened.wait(60) and write(*a, **k))
    return opened


def test_training_goes_on_while_a_save_is_written_and_does_not_reach_it(tmp_path, gate):
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, 3)
    saver = saving.Saver(tmp_path / "beside", {"format": 1}, 2)
    saver.save(3, parts(model, optimizer), {"samples_seen": 3})
    at_once = {k: {n: x.clone() for n, x in v.items()} for k, v in parts(model, optimizer).items()}
    train(model, optimizer, 2)
    assert not saver.failed() and not (tmp_path / "beside/latest").exists()
    gate.set()
    saver.wait()
    waited_for = saving.save(tmp_path / "waited", 3, at_once, {"samples_seen": 3}, {"format": 1})
    beside = checkpoints.latest(tmp_path / "beside")
    for part in ("weights", "ema", "optimizer"):
        assert checkpoints.weights_hash(beside, part) == checkpoints.weights_hash(waited_for, part)


def test_one_save_is_written_at_a_time(tmp_path, gate):
    model = network()
    optimizer = adamw(model)
    saver = saving.Saver(tmp_path, {}, 2)
    saver.save(1, parts(model, optimizer), {"samples_seen": 1})
    threading.Timer(0.1, gate.set).start()
    saver.save(2, parts(model, optimizer), {"samples_seen": 2})
    checkpoints.verify(tmp_path / "step_00000001")
    saver.wait()
    assert checkpoints.latest(tmp_path).name == "step_00000002"


def test_equal_weights_have_equal_hashes_whatever_their_files(tmp_path):
    model = network()
    one, two = save(tmp_path / "a", 1, model, adamw(model)), save(tmp_path / "b", 7, model, adamw(model))
    assert checkpoints.weights_hash(one) == checkpoints.weights_hash(two) != checkpoints.weights_hash(one, "weights")
    with torch.no_grad():
        model[0].bias[0] += 0.5
    assert checkpoints.weights_hash(save(tmp_path / "b", 8, model, adamw(model))) != checkpoints.weights_hash(one)
    tensors = [{"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"b": torch.zeros(2, 3)}, {"a": torch.zeros(6)}]
    paths = [saving.save(tmp_path / f"c{i}", 1, {"ema": t}, {}, {}) for i, t in enumerate(tensors)]
    assert len({checkpoints.weights_hash(p) for p in paths}) == 4
    damage_truncate(one)
    with pytest.raises(ValueError, match="cannot be used"):
        checkpoints.weights_hash(one)


def damage_truncate(path):
    file = next((path / "ema").iterdir())
    os.truncate(file, file.stat().st_size // 2)
    return file.name


def damage_flip(path):
    file = next((path / "weights").iterdir())
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    return file.name


def damage_remove(path):
    (path / "state.json").unlink()
    return "state.json"


def damage_manifest(path):
    (path / "manifest.json").write_text("{")
    return "manifest.json"


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_flip, damage_remove, damage_manifest], ids=lambda f: f.__name__
)
def test_damage_is_refused_by_name_with_the_previous_good_one(tmp_path, damage):
    model = network()
    optimizer = adamw(model)
    good, bad = save(tmp_path, 1, model, optimizer), save(tmp_path, 2, model, optimizer)
    named = damage(bad)
    with pytest.raises(ValueError) as caught:
        checkpoints.verify(checkpoints.latest(tmp_path))
    assert named in str(caught.value) and f"resume={good}" in str(caught.value)
    checkpoints.verify(good)
    found, wrong = checkpoints.newest_good(tmp_path)
    assert found == good and len(wrong) == 1 and named in wrong[0]
    damage(good)
    with pytest.raises(ValueError, match="no checkpoint can be used") as caught:
        checkpoints.newest_good(tmp_path)
    assert str(good) in str(caught.value) and str(bad) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        checkpoints.resolve(tmp_path / "nowhere")


def test_another_format_is_refused_and_not_gone_round(tmp_path):
    model = network()
    optimizer = adamw(model)
    assert checkpoints.newest_good(tmp_path) == (None, [])
    save(tmp_path, 1, model, optimizer)
    path = save(tmp_path, 2, model, optimizer)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    for read in (checkpoints.verify, lambda p: checkpoints.newest_good(p.parent)):
        with pytest.raises(ValueError, match="format 99, this version reads format 1"):
            read(path)


def test_another_model_is_refused_by_name(tmp_path):
    model = network()
    path = save(tmp_path, 1, model, adamw(model))
    other = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"`0\.weight` is \(5, 3\) there, \(6, 3\) here"):
        checkpoints.restore(path, other.state_dict(), {})


@contextmanager
def files_at_most(size):
    """A write beyond it fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [0, 100, 250, 100_000])  # nothing; within tensors; within the manifest; within tensors
def test_a_full_disk_leaves_the_last_checkpoint_and_is_told_at_the_next_step(tmp_path, size):
    model = network()
    good = save(tmp_path, 1, model, adamw(model))
    tensors = {"weights": nn.Linear(1000, 300).state_dict()} if size > 250 else {"weights": {"a": torch.zeros(1)}}
    saver = saving.Saver(tmp_path, {}, 2)
    with files_at_most(size):
        saver.save(2, tensors, {"samples_seen": 2})
        while not saver.failed():
            time.sleep(0.01)
    with pytest.raises(OSError):
        saver.save(3, tensors, {"samples_seen": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", good.name]
    checkpoints.verify(checkpoints.latest(tmp_path))
    saver.save(3, tensors, {"samples_seen": 3})
    saver.wait()
    assert checkpoints.newest_good(tmp_path) == (tmp_path / "step_00000003", [])


def test_a_disk_full_at_the_last_file_leaves_no_checkpoint_that_nothing_points_to(tmp_path, monkeypatch):
    model = network()
    good = save(tmp_path, 1, model, adamw(model))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "point_latest", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, model, adamw(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", good.name]


SAVER = """
import sys, torch
from pathlib import Path
from vgr.training import saving
step = 0
while True:
    step += 1
    tensors = {"weights": {"a": torch.full((200_000,), float(step))}, "ema": {"a": torch.full((200_000,), step + 0.5)}}
    saving.save(Path(sys.argv[1]), step, tensors, {"samples_seen": step}, {})
    print(step, flush=True)
"""


def test_killed_while_saving_the_last_one_is_whole(tmp_path):
    """A process that does nothing but save is killed at many moments; `latest` always names a whole checkpoint."""
    folders = [tmp_path / str(i) for i in range(3)]
    processes = [
        subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True)
        for folder in folders
    ]
    for i, (folder, process) in enumerate(zip(folders, processes)):
        process.stdout.readline()
        time.sleep(0.05 + 0.037 * i)
        process.kill()
        told = [int(line) for line in process.stdout.read().split()]
        process.wait()
        path = checkpoints.latest(folder)
        checkpoints.verify(path)
        step = checkpoints.read_state(path)["samples_seen"]
        assert step >= max(told, default=1)
        assert torch.equal(checkpoints.read_weights(path, "ema")["a"], torch.full((200_000,), step + 0.5))


def test_learning_rate_and_average_follow_samples_alone():
    assert [optim.lr_factor(s, 3, 100, "constant") for s in (0, 1, 2, 3, 50)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert optim.lr_factor(100, 0, 100, "cosine", final=0.1) == pytest.approx(0.1)
    assert optim.lr_factor(50, 0, 100, "cosine") == pytest.approx(0.5)
    # Once the ramp is over, half the weight of the past is gone after one half-life, in steps of any size.
    for batch in (1, 10, 50):
        weight = 1.0
        for seen in range(10_000, 10_100, batch):
            weight *= optim.ema_decay(seen, batch, half_life=100.0)
        assert weight == pytest.approx(0.5)
    average, current = [torch.zeros(2)], [torch.tensor([1.0, -2.0])]
    optim.ema_update(average, current, 0.75)
    assert torch.allclose(average[0], torch.tensor([0.25, -0.5]))


def test_vectors_norms_and_gates_do_not_decay():
    decayed = {n for n, p in network().named_parameters() if optim.decays(n, p)}
    assert decayed == {"0.weight", "2.weight"}
    table = torch.zeros(6, 8)
    assert not optim.decays("blocks.0.scale_shift_table", table) and not optim.decays("blocks.0.attn.A_log", table)
