"""What a training step owes to precision and memory, what happens between steps to the other ranks and to the codec."""

import signal
from types import SimpleNamespace

import pytest
import torch

from vgr.data.shards import Sample
from vgr.generator import Generator, sample_writer
from vgr.models.causal_video import CausalVideo
from vgr.models.codec import CosineCodec
from vgr.models.text import ByteTextEncoder
from vgr.models.world_model import WorldModel
from vgr.training import teacher_paths
from vgr.training.callbacks import BetweenSteps
from vgr.training.self_forcing import SelfForcing
from vgr.types import Cameras, VideoBatch

CODEC = {"stride": [4, 8, 8], "luma": [2], "chroma": [0]}
SMALL = {"in_channels": 4, "width": 32, "heads": 2, "layers": 2, "softmax_every": 2, "text_width": 16, "raw_frames": 4}
K = (0.5, 0.6, 0.5, 0.5)


def _model(**changes):
    model = WorldModel(**SMALL, **changes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _batch():
    c2w = torch.eye(4).repeat(2, 17, 1, 1)
    c2w[:, :, 0, 3] = torch.arange(17) * 0.1
    return VideoBatch(
        _normal(2, 4, 5, 4, 4), Cameras(c2w, torch.tensor(K).expand(2, 17, 4)), torch.full((2,), 8.0),
        (("a",), ("b",)), torch.zeros(2, 5, dtype=torch.int64), ("x", "y"), torch.tensor([6, 7]),
    )  # fmt: skip


def _forcing(**changes):
    torch.manual_seed(0)
    model, text, codec = _model(**changes), ByteTextEncoder(16, 16, 1, 2), CosineCodec(**CODEC)
    teacher = {"model": _model(), "text": ByteTextEncoder(16, 16, 1, 2)}
    module = SelfForcing(
        model, text, codec, teacher, seed=1, global_batch=4, max_samples=400, sigmas=[1.0, 0.75, 0.0], chunk=2,
        critic_steps=2,
    )  # fmt: skip
    backward = SimpleNamespace(backward=lambda loss, *_, **__: loss.backward())
    module._trainer = SimpleNamespace(world_size=1, strategy=backward)
    module.optimizers = lambda use_pl_optimizer: ()
    module.samples_seen = 4  # the student's turn
    return module


def test_a_step_in_bf16_has_the_gradients_of_a_backward_pass_outside_autocast():
    batch, module, other = _batch(), _forcing(), _forcing()
    with torch.autocast("cpu", torch.bfloat16):
        module.training_step(batch, 0)  # the first of two micro-batches: no update
    with torch.autocast("cpu", torch.bfloat16):
        segment = next(other.segments(batch))
        loss_B, sample, exits, _ = other.student_losses(segment)
    (dx,) = torch.autograd.grad(loss_B.mean() / 2, sample)
    with torch.autocast("cpu", torch.bfloat16):
        made = [exit_.again(other.model) for exit_ in exits]
    for clean, own in zip(made[::-1], dx.split([x.shape[2] for x in made], dim=2)[::-1]):
        clean.backward(own)
    with torch.autocast("cpu", torch.bfloat16):
        loss = other.critic_losses(segment)[0].mean() / 2
    loss.backward()
    for (name, p), q in zip(module.named_parameters(), other.parameters()):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name
    # Weights used without gradient before (context, earlier times) have one where they are used with it.
    for network in (module.model, module.critic):
        assert all(p.grad is not None for n, p in network.named_parameters() if n.endswith("qkv.weight"))


@pytest.mark.parametrize("recompute", [True, False])
def test_the_critic_recomputes_its_blocks_if_the_student_does(recompute):
    assert _forcing(activation_checkpointing=recompute).critic.activation_checkpointing is recompute


def test_a_signal_to_another_rank_stops_this_one_after_the_same_save(tmp_path, monkeypatch):
    every = dict.fromkeys(("log", "validate", "sample", "save"), 0)
    steps = BetweenSteps(tmp_path, None, None, every, 2, {}, {}, (), None)
    steps._seen, saved = 0, []
    monkeypatch.setattr(steps, "_save", lambda module, loss: saved.append(module))
    module = SimpleNamespace(samples_seen=8, global_batch=8, max_samples=80, step=1, last_step={"train/loss": 1.0})
    strategy = SimpleNamespace(reduce_boolean_decision=lambda own, all: own or told)
    trainer = SimpleNamespace(strategy=strategy, is_global_zero=False, should_stop=False)
    told = False
    steps.on_train_batch_end(trainer, module)
    assert not saved and not trainer.should_stop and steps.signal is None
    told, module.samples_seen = True, 16
    steps.on_train_batch_end(trainer, module)
    assert saved == [module] and trainer.should_stop and steps.signal == signal.SIGTERM


def test_ranks_measure_their_shares_and_the_first_tells_of_all_of_them(tmp_path):
    every = dict.fromkeys(("log", "validate", "sample", "save"), 0) | {"bench": 16}
    told, events = [], []
    module = SimpleNamespace(samples_seen=16, global_batch=8, max_samples=80, step=2, last_step={"train/loss": 1.0})
    record = SimpleNamespace(log=lambda values, seen: told.append((values, seen)))

    def bench(module, out, part):
        events.append((out.name, part))
        return {"bench/psnr_db": 20.0} if part == (0, 1) else {}

    for rank in (1, 0):
        strategy = SimpleNamespace(reduce_boolean_decision=lambda own, all: own, barrier=events.append)
        trainer = SimpleNamespace(strategy=strategy, is_global_zero=rank == 0, global_rank=rank, world_size=2)
        steps = BetweenSteps(tmp_path, None, record, every, 2, {}, {}, (), None, bench)
        steps._seen, steps._time, steps._show = 8, 0.0, lambda module: None
        steps.on_train_batch_end(trainer, module)
    whole = [("00000016", (0, 1))]
    shares = [[("00000016", (rank, 2)), "shares measured", *extra, "measured"] for rank, extra in ((1, []), (0, whole))]
    assert events == shares[0] + shares[1] and told == [({"step": 2, "bench/psnr_db": 20.0}, 16)]


def _record():
    return {"fps": 8.0, "max_frames": 17, "size_hw": [32, 32], "intrinsics": list(K), "chunk": None}


def test_the_codec_works_in_fp32_whatever_the_model_works_in():
    codec = CosineCodec(**CODEC)
    parts = {"model": _model(), "text": ByteTextEncoder(16, 16, 1, 2), "codec": codec}
    sampling = {"method": "joint", "steps": 1, "shift": 3.0, "guidance": 1.0, "sigmas": None}
    generator = Generator(parts, _record(), "x", "", {}, sampling, "cpu")
    images = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images, latents = images.numpy(), _normal(2, codec.channels, 3, 4, 4)
    encoded, decoded = generator._encode(images, [0]), generator.decoded(codec.decode, latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generator._encode(images, [0]), encoded)
        assert (generator.decoded(codec.decode, latents) == decoded).all()


def test_a_run_that_never_samples_decodes_nothing():
    class Never(CosineCodec):
        def decode(self, latents):
            raise AssertionError("a minute of 720p takes hours on a CPU")

    assert callable(sample_writer(_record(), Never(**CODEC), _batch(), 0))


@pytest.mark.parametrize("causal", [False, True])
def test_trajectories_are_of_a_clips_first_frames(monkeypatch, tmp_path, causal):
    """Five of a clip's nine latent frames: the teacher sees no more of it, and its cameras end there.

    A causal teacher goes under the clip's own frames, which stand behind the path.
    """
    codec = CosineCodec(**CODEC)
    clip = Sample(
        _normal(4, 9, 4, 4).numpy(), torch.eye(4).repeat(33, 1, 1).numpy(), torch.tensor(K).repeat(33, 1).numpy(), 8.0,
        {"shots": [{"start": 0, "end": 33, "caption": "a"}]}, "k",
    )  # fmt: skip
    head = {"codec": {"name": "CosineCodec"}, "size_hw": [32, 32], "fps": 8.0, "licence": "CC0"}

    class Clips(list):
        manifest = head

    written, kept = [], []

    class Writer:
        done = 0

        def __init__(self, *_, extra, **__):
            written.append((extra["frames"], extra.get("history")))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add(self, key, latents, c2w, intrinsics, meta):
            written.append((latents.shape, len(c2w), len(intrinsics)))
            kept.append(latents)

    clips = Clips([clip])
    clips.read = lambda i: clip
    sizes = {k: v for k, v in SMALL.items() if k not in ("softmax_every", "raw_frames")}
    model = CausalVideo(**sizes, ffn_width=64, text_length=16) if causal else _model()
    parts = {"model": model, "text": ByteTextEncoder(16, 16, 1, 2), "codec": codec}
    monkeypatch.setattr(teacher_paths, "rebuild_teacher", lambda *_, **__: parts)
    monkeypatch.setattr(teacher_paths, "Shards", lambda *_: clips)
    monkeypatch.setattr(teacher_paths, "ShardWriter", Writer)
    monkeypatch.setattr(teacher_paths.checkpoints, "resolve", lambda path: path)
    monkeypatch.setattr(teacher_paths.checkpoints, "weights_hash", lambda path: "hash")
    own = {"chunk": 2, "image": False} if causal else {}
    monkeypatch.setattr(teacher_paths.checkpoints, "read_generator", lambda _: {"sampling": {}})
    monkeypatch.setattr(teacher_paths.checkpoints, "read_state", lambda _: {"config": {"data": {}}})
    paths = teacher_paths.TeacherPaths("run", "clips", [1.0, 0.5, 0.0], 1, 2, 3.0, 1.0, frames=17, **own)
    assert paths.write(tmp_path / "out", 1, 1, lambda n: None, "cpu") == 1
    assert written == [(17, causal or None), (((3 + causal) * 4, 5, 4, 4), 17, 17)]
    assert not causal or (kept[0][-4:] == clip.latents[:, :5]).all()
