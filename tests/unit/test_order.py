import logging
from collections import Counter

import numpy as np
import pytest
import torch

from vgr.data.modules import MicroBatches, ShardData, collate
from vgr.data.order import Mixture, Order
from vgr.data.shards import ShardWriter

COUNTS = (5, 5, 5, 3)


def test_a_pass_holds_every_sample_once_and_passes_differ():
    order = Order(COUNTS, seed=3, global_batch=6, window=2)
    taken = [i for b in range(9) for i in order.batch(b)]  # 54 positions are three passes of 18
    passes = [taken[i : i + 18] for i in (0, 18, 36)]
    assert all(sorted(p) == list(range(18)) for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != Order(COUNTS, seed=4, global_batch=6, window=2).batch(0) + [0]


def test_batches_do_not_depend_on_what_was_asked_before_or_on_batch_size():
    order = Order(COUNTS, 3, 6, window=2)
    late = order.batch(7)
    assert late == Order(COUNTS, 3, 6, window=2).batch(7)
    flat = [i for b in range(8) for i in order.batch(b)]
    halves = Order(COUNTS, 3, 3, window=2)
    assert flat == [i for b in range(16) for i in halves.batch(b)]


def test_two_levels_stay_in_their_window_of_shards():
    counts = (10,) * 8
    order = Order(counts, 1, 20, window=2)
    for b in range(4):
        assert len({i // 10 for i in order.batch(b)}) == 2  # one window of two shards a batch
    assert len({i // 10 for i in order.batch(0)[:10]}) == 2  # and mixed within it


def test_candidates_begin_with_the_sample_and_are_functions_of_the_position():
    order = Order(COUNTS, 3, 6)
    first = [next(order.candidates(p)) for p in range(18)]
    assert first == [order.sample(p) for p in range(18)]
    draws = [[next(c) for _ in range(50)] for c in (order.candidates(4), order.candidates(4), order.candidates(5))]
    assert draws[0] == draws[1] and draws[0][1:] != draws[2][1:] and len(set(draws[0])) > 10


def test_nothing_to_order_is_refused():
    with pytest.raises(ValueError, match="0 samples"):
        Order((), 1, 4)


def write(folder, count, cut=True):
    with ShardWriter(folder, "Toy", "abc", (4, 8, 8), 2, (16, 16), 17.5, "CC0-1.0", samples_per_shard=5) as writer:
        for i in range(count):
            shots = [{"start": 0, "end": 6, "caption": f"a{i}"}, {"start": 6, "end": 9, "caption": f"b{i}"}]
            c2w = np.tile(np.eye(4), (9, 1, 1))
            c2w[:, 0, 3] = 1000 + i + 0.001 * np.arange(9)
            latents = np.full((2, 3, 2, 2), i, np.float16)
            writer.add(f"k{i}", latents, c2w, np.full((9, 4), 0.5), {"shots": shots if cut else shots[:1]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write(path / "train", 18)
    write(path / "val", 7)
    return path


def data(folder, micro=2, total=6, start=0, **kwargs):
    module = ShardData(str(folder / "train"), str(folder / "val"), "abc", 3, 8, micro, **kwargs)
    module.start_batch, module.total_batches = start, total
    return module


def test_ranks_together_see_the_same_global_batches(folder):
    wanted = [[f"k{i}" for i in Order((5, 5, 5, 3), 3, 8).batch(b)] for b in range(6)]
    for world in (1, 2, 4):
        ranks = [list(data(folder).micro_batches(r, world)[i] for i in range(6 * 4 // world)) for r in range(world)]
        for b in range(6):
            pairs = []
            for rank in ranks:
                for batch in rank[b * 4 // world : (b + 1) * 4 // world]:
                    pairs += zip(batch.position.tolist(), batch.keys, strict=True)
            assert [key for _, key in sorted(pairs)] == wanted[b]
            assert [p for p, _ in sorted(pairs)] == list(range(8 * b, 8 * b + 8))


def test_a_restart_goes_on_as_if_never_interrupted(folder):
    whole = list(data(folder).train_dataloader())
    rest = list(data(folder, start=4).train_dataloader())
    workers = list(data(folder, start=4, workers=2).train_dataloader())
    assert len(whole) == 24 and len(rest) == len(workers) == 8
    for a, b, c in zip(whole[16:], rest, workers, strict=True):
        assert a.keys == b.keys == c.keys and (a.position == b.position).all() and (a.position == c.position).all()
        assert torch.equal(a.latents, b.latents) and torch.equal(a.latents, c.latents)


def test_batches_have_the_stated_form(folder):
    batch = data(folder).val_batches(4)[0]
    assert batch.latents.shape == (4, 2, 3, 2, 2) and batch.latents.dtype == torch.float32
    assert batch.cameras.c2w.shape == (4, 9, 4, 4) and batch.cameras.c2w.dtype == torch.float32
    # A kilometre from the origin, millimetre steps survive: poses are relative to the first before float32.
    np.testing.assert_allclose(batch.cameras.c2w[1, :, 0, 3].numpy(), 0.001 * np.arange(9), atol=1e-9)
    assert batch.fps.tolist() == [17.5] * 4 and batch.shot.tolist() == [[0, 0, 1]] * 4
    assert batch.captions[0] == ("a0", "b0") and batch.position.tolist() == [0, 1, 2, 3]


def test_validation_clips_are_fixed_and_spread(folder):
    module = data(folder, val_clips=4)
    batches = module.val_batches(3)
    assert [b.keys for b in batches] == [("k0", "k2", "k4"), ("k6",)]
    assert sum(len(b.keys) for b in data(folder).val_batches(3)) == 7


def test_frames_keeps_the_beginning_and_its_shots(folder):
    batch = data(folder, frames=5).val_batches(2)[0]
    assert batch.latents.shape[2] == 2 and batch.cameras.c2w.shape[1] == 5
    assert batch.captions[0] == ("a0",) and batch.shot.tolist() == [[0, 0]] * 2
    for frames in (4, 13):
        with pytest.raises(ValueError, match="frames"):
            data(folder, frames=frames).val_batches(2)


def test_sizes_that_do_not_divide_are_refused(folder):
    with pytest.raises(ValueError, match="micro_batch=3"):
        data(folder, micro=3)
    with pytest.raises(ValueError, match="3 ranks"):
        data(folder).micro_batches(0, 3)


def damage(path, shards, indices):
    for i in indices:
        file, _, members = shards._samples[i]
        raw = bytearray((path / file).read_bytes())
        raw[members["latent.npy"][0] + 90] ^= 255
        (path / file).write_bytes(raw)


def test_damaged_samples_are_replaced_in_place_counted_and_named(tmp_path, caplog):
    write(tmp_path / "train", 18)
    write(tmp_path / "val", 3)
    clean = [key for b in data(tmp_path).train_dataloader() for key in b.keys]
    module = data(tmp_path, max_damaged=0.12)
    damage(tmp_path / "train", module.train_shards, (4, 9))
    with caplog.at_level(logging.WARNING):
        batches = list(module.train_dataloader())
    keys = [key for b in batches for key in b.keys]
    assert not {"k4", "k9"} & set(keys)
    changed = [i for i, (a, b) in enumerate(zip(clean, keys, strict=True)) if a != b]
    assert changed == [i for i, key in enumerate(clean) if key in ("k4", "k9")]
    named = Counter(word for r in caplog.records for word in ("k4.", "k9.") if word in r.getMessage())
    assert named == {"k4.": 1, "k9.": 1} and "2 damaged so far" in caplog.records[-1].getMessage()
    # The same replacements with other ranks and from the middle.
    with caplog.at_level(logging.CRITICAL):
        second = data(tmp_path, start=3, max_damaged=0.12).micro_batches(1, 2)
        assert [second[i].keys for i in range(len(second))] == [b.keys for b in batches[12:]][1::2]


def test_too_many_damaged_samples_stop_the_run(tmp_path):
    write(tmp_path / "train", 18)
    write(tmp_path / "val", 3)
    module = data(tmp_path)
    damage(tmp_path / "train", module.train_shards, (4,))
    with pytest.raises(ValueError, match=r"1 of 18 samples .*max_damaged=0.01.*k4"):
        list(module.train_dataloader())


def test_small_sets_are_read_once(folder, monkeypatch):
    reads = Counter()
    module = data(folder)
    read = module.train_shards.read
    monkeypatch.setattr(module.train_shards, "read", lambda i: (reads.update([i]), read(i))[1])
    list(module.train_dataloader())
    assert max(reads.values()) == 1 and len(reads) == 18
    monkeypatch.setattr("vgr.data.modules.CACHE_BYTES", 0)
    assert isinstance(module.micro_batches(), MicroBatches) and module.micro_batches()._cache is None


def test_collate_takes_clips_of_one_shot(folder):
    samples = [data(folder).train_shards.read(i) for i in (0, 1)]
    batch = collate(samples, [7, 9])
    assert batch.position.tolist() == [7, 9] and batch.keys == ("k0", "k1")


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.5, 0.3, 0.2), (1, 1, 1), (1000, 1, 7), (0.1, 1e-3)])
def test_each_part_has_its_exact_share_of_every_block(weights):
    mix, share = Mixture(weights, 5), np.array(weights) / sum(weights)
    blocks = max(3, 3000 // mix.block)
    taken = np.array([mix.place(b)[0] for b in range(blocks * mix.block)])
    for block in range(1, blocks + 1):
        counts = np.bincount(taken[: block * mix.block], minlength=len(weights))
        np.testing.assert_array_less(np.abs(counts - share * block * mix.block), 1 + 1e-9)
    assert len(set(map(tuple, taken.reshape(blocks, -1)))) > 1  # shuffled anew in every block
    # How many batches of the part went before is told right, and from nothing but (seed, b).
    b = len(taken) - 7
    assert Mixture(weights, 5).place(b) == (taken[b], int((taken[:b] == taken[b]).sum()))
    assert [Mixture(weights, 6).place(b)[0] for b in range(len(taken))] != taken.tolist()


def test_weights_that_are_none_are_refused():
    for weights in ((), (1, 0), (1, -1), (float("nan"), 1)):
        with pytest.raises(ValueError, match="above 0"):
            Mixture(weights, 1)


def write_size(folder, name, count, frames, side):
    """Clips called <name><number>, of `frames` frames at side x side pixels."""
    with ShardWriter(folder, "Toy", "abc", (4, 8, 8), 2, (side, side), 8.0, "CC0", samples_per_shard=4) as writer:
        for i in range(count):
            length = frames[i % len(frames)]
            shots = {"shots": [{"start": 0, "end": length, "caption": name}]}
            shape = (2, 1 + (length - 1) // 4, side // 8, side // 8)
            writer.add(f"{name}{i}", np.full(shape, i, np.float16), np.tile(np.eye(4), (length, 1, 1)),
                       np.full((length, 4), 0.5), shots)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    path = tmp_path_factory.mktemp("sets")
    write_size(path / "a", "a", 10, (9,), 16)
    write_size(path / "b", "b", 12, (5, 9, 9), 24)
    write_size(path / "val", "v", 2, (9,), 16)
    return path


def mixed(sets, total, start=0, train=None, micro=2, **kwargs):
    train = train or [{"path": f"{sets}/a", "weight": 1}, {"path": f"{sets}/b", "weight": 3}]
    module = ShardData(train, str(sets / "val"), "abc", 3, 8, micro, **kwargs)
    module.start_batch, module.total_batches = start, total
    return module


def test_a_global_batch_is_of_one_set_and_size_in_exact_shares_and_each_clip_once_a_pass(sets):
    batches = list(mixed(sets, 128, micro=8).train_dataloader())
    kinds = Counter((b.keys[0][0], tuple(b.latents.shape[2:])) for b in batches)
    assert kinds == {("a", (3, 2, 2)): 32, ("b", (2, 3, 3)): 32, ("b", (3, 3, 3)): 64}
    for name, size, frames in (("a", 10, 3), ("b", 4, 2), ("b", 8, 3)):
        keys = [k for b in batches for k in b.keys if k[0] == name and b.latents.shape[2] == frames]
        assert all(len(set(keys[i : i + size])) == size for i in range(0, len(keys) - size + 1, size))
    assert [p for b in batches for p in b.position.tolist()] == list(range(128 * 8))


def test_a_mixture_is_the_same_at_any_world_size_and_after_a_restart(sets):
    wanted = [[k for batch in list(mixed(sets, 12).train_dataloader())[4 * b : 4 * b + 4] for k in batch.keys]
              for b in range(12)]
    for world in (1, 2, 4):
        ranks = [mixed(sets, 12, start=5).micro_batches(r, world) for r in range(world)]
        for b in range(7):
            per = 4 // world
            parts = [rank[b * per + m] for m in range(per) for rank in ranks]
            assert [k for part in parts for k in part.keys] == wanted[5 + b]


def test_a_list_of_one_set_is_that_set_and_weights_default_to_clips(sets):
    one, alone = mixed(sets, 20, train=[f"{sets}/a"]), mixed(sets, 20, train=f"{sets}/a")
    assert [b.keys for b in one.train_dataloader()] == [b.keys for b in alone.train_dataloader()]
    own, plain = alone.order.parts[0].order, Order((4, 4, 2), 3, 8)
    assert [own.sample(p) for p in range(30)] == [plain.sample(p) for p in range(30)]
    by_clips = mixed(sets, 64, train=[f"{sets}/a", {"path": f"{sets}/b"}], frames=5, micro=8)
    shares = Counter(b.keys[0][0] for b in by_clips.train_dataloader())
    assert shares == {"a": 29, "b": 35}  # 64 batches by 10 and 12 clips; cut to 5 frames all are of one length
    for train in ([], [{"path": "x", "wieght": 1}], [{"weight": 1}]):
        with pytest.raises(ValueError, match="data.train"):
            ShardData(train, f"{sets}/val", "abc", 3, 8, 2)


def test_a_damaged_clip_of_a_mixture_is_replaced_from_its_own_part(sets, tmp_path):
    import shutil

    shutil.copytree(sets, tmp_path / "sets")
    module = mixed(tmp_path / "sets", 64, micro=8, max_damaged=0.2)
    damage(tmp_path / "sets/b", module.train_sets[1], (0, 3))  # two of the four short ones
    clean = list(mixed(sets, 64, micro=8).train_dataloader())
    for before, now in zip(clean, module.train_dataloader()):
        assert before.latents.shape == now.latents.shape and not {"b0", "b3"} & set(now.keys)
        assert all(a == b for a, b in zip(before.keys, now.keys) if a not in ("b0", "b3"))
