"""The refiner's training, end to end at toy size: pairs, runs, resuming, adapters, their export, refinement, errors."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))
from small_training import CODEC, GRID, make_project, metrics, train  # noqa: E402
from test_export import run as export  # noqa: E402

from vgr.data.modules import ShardData  # noqa: E402
from vgr.data.shards import Shards  # noqa: E402
from vgr.models.codec import CosineCodec  # noqa: E402
from vgr.models.refiner import Refiner  # noqa: E402
from vgr.training import checkpoints  # noqa: E402
from vgr.training.pairs import Pairs  # noqa: E402
from vgr.training.rebuild import read, rebuild  # noqa: E402
from vgr.training.refining import Refinement  # noqa: E402
from vgr.training.validation import validate_pairs  # noqa: E402
from vgr.types import Conditioning, Layout, TextStates  # noqa: E402

SIZE = """# @package _global_
model: {in_channels: 16, text_width: 16, heads: 2, head_dim: 12, layers: 2, fps: 8.0}
codec: {stride: [4, 8, 8], luma: [4], chroma: [0], latents_mean: null, latents_std: null}
data: {train: pairs/train, val: pairs/val, micro_batch: 4, val_clips: 8}
training: {global_batch: 8, max_samples: 160, warmup_samples: 16, lr: 3.0e-3, ema_half_life: 40}
every: {log: 80, validate: 160, sample: 0, save: 80}
"""
WORDS = ("experiments=world_model/refiner", "size=refiner_tiny", "+small=toy", "trainer.accelerator=cpu")
BYTES = ("text.width=16", "text.length=16", "text.heads=2")
PARTS = ("weights", "ema", "optimizer")


def _refine(folder, *more):
    return train(folder, *WORDS, *BYTES, *more)


def _only(folder, runs):
    (run,) = Path(folder, runs).rglob("seed1")
    return run


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Pairs of a run's samples, and of degraded clips; a run that trains all weights, and one of adapters on that."""
    folder = make_project(tmp_path_factory.mktemp("refiner"))
    assert train(folder).returncode == 0
    (folder / "own/small").mkdir()
    (folder / "own/small/toy.yaml").write_text(SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, run in (("blurred", None), ("pairs", "runs/mini/seed1")):
            pairs = Pairs("shards", CosineCodec(**CODEC), run, factor=4, batch=8)
            for split, count in (("train", 40), ("val", 8)):
                assert pairs.write(Path(name, split), count, 1, lambda more: None, "cpu") == count
    done = _refine(folder, "runs=whole")
    assert done.returncode == 0, done.stderr[-3000:]
    done = _refine(folder, "runs=adapters", f"base={_only(folder, 'whole')}", *LORA)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


LORA = ("lora.rank=3", "lora.alpha=6")


def test_pairs_are_the_clip_beside_its_blurred_self(project, monkeypatch):
    """Re-made by hand: means of squares of 4 pixels, as large again, in the codec's latents."""
    monkeypatch.chdir(project)
    codec, made, clips = CosineCodec(**CODEC), Shards("blurred/val"), Shards("shards/val")
    assert made.manifest["extra"]["pairs"] is True and made.manifest["codec"]["channels"] == 32
    pair, clip = made.read(3), clips.read(3)
    assert np.array_equal(pair.latents[16:], clip.latents) and np.array_equal(pair.c2w, clip.c2w)
    video = codec.decode(torch.from_numpy(clip.latents).float()[None])[0].numpy()
    small = torch.from_numpy(video.reshape(3, 17, 8, 4, 8, 4).mean((3, 5)))
    blurred = torch.nn.functional.interpolate(small.transpose(0, 1), (32, 32), mode="bicubic").transpose(0, 1)
    expected = codec.encode(blurred[None])[0].numpy()
    np.testing.assert_allclose(pair.latents[:16], expected, atol=5e-3)
    assert np.abs(expected - clip.latents).max() > 0.1
    pairs = Pairs("shards", codec, factor=4, batch=8)
    assert pairs.write(Path("blurred/val"), 8, 1, lambda more: None, "cpu") == 0
    with pytest.raises(ValueError, match="another extra"):
        pairs.write(Path("blurred/val"), 8, 2, lambda more: None, "cpu")
    with pytest.raises(ValueError, match="source.factor=1"):
        Pairs("shards", codec, factor=1)


@pytest.mark.parametrize("sampling", [{}, {"training.chunk": 2, "sampling.method": "stream"}])
def test_pairs_of_a_run_are_its_own_samples(project, monkeypatch, sampling):
    """Under a clip's own text, cameras and first frame; the sampler written out where it is joint."""
    from vgr.diffusion.guidance import guided
    from vgr.diffusion.samplers import euler, frame_noise
    from vgr.diffusion.timesteps import sigma_grid
    from vgr.seeding import derive_seed
    from vgr.training.conditioning import conditioning

    done = train(project, "training.max_samples=16", "runs=stage1", *(f"{k}={v}" for k, v in sampling.items()))
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.chdir(project)
    run, codec = done.stdout.split("run folder ")[1].split(", val")[0], CosineCodec(**CODEC)
    folder = Path(f"sampled{len(sampling)}", "train")
    Pairs("shards", codec, run=run, batch=2).write(folder, 3, 1, lambda more: None, "cpu")
    made = Shards(folder)
    assert made.manifest["extra"]["run"] == checkpoints.weights_hash(checkpoints.resolve(Path(run)))
    data = ShardData("shards/train", "shards/val", None, 1, 1, 1)
    sample = made.read(2)
    truth = data.train_shards.read(2)
    assert np.array_equal(sample.latents[16:], truth.latents)
    assert np.abs(sample.latents[:16, 1:].astype(float) - truth.latents[:, 1:]).max() > 0.1
    np.testing.assert_allclose(sample.latents[:16, 0], truth.latents[:, 0], atol=1e-2)
    if not sampling:
        from vgr.data.modules import collate

        parts, batch = rebuild(checkpoints.resolve(Path(run))), collate([truth], [2])
        with torch.no_grad():
            cond = conditioning(parts["text"].eval(), batch.captions, batch.cameras, batch.shot, 4, None)
            denoiser = guided(parts["model"].eval(), 1.5, parts["text"]((("",),)))
            noise = frame_noise([derive_seed(1, "stage 1", 2)], (16, *GRID), "cpu")(torch.arange(5), 0)
            expected = euler(denoiser, noise, cond, sigma_grid(2, 3.0), batch.latents[:, :, :1])
        np.testing.assert_allclose(sample.latents[:16], expected[0].numpy(), atol=2e-2, rtol=2e-2)


def test_training_learns_to_refine_held_out_pairs(project, monkeypatch):
    """Nearer to the truth than the untrained refiner, paired over clips."""
    monkeypatch.chdir(project)
    batches = ShardData("pairs/train", "pairs/val", None, 1, 4, 4).val_batches(4)
    args = dict(sigma_start=0.909375, reference=1, seed=1, chunk=None, device="cpu")
    trained = rebuild(checkpoints.latest(_only(project, "whole") / "checkpoints"), refiner=True)
    torch.manual_seed(0)
    before, after = (
        validate_pairs(model.eval(), trained["text"].eval(), batches, (0.5,), **args).distance_N3
        for model in (Refiner(**trained["model"].config), trained["model"])
    )
    gain = (before - after)[:, 1]
    assert gain.mean() > 1.96 * gain.std() / len(gain) ** 0.5
    assert torch.equal(before[:, 0], after[:, 0])


@pytest.mark.parametrize("runs", ["whole", "adapters"])
def test_a_run_resumes_to_the_same_bits(project, runs):
    run = _only(project, runs)
    last = checkpoints.latest(run / "checkpoints")
    before, told = {p: checkpoints.weights_hash(last, p) for p in PARTS}, metrics(run)
    (run / "checkpoints/latest").write_text(sorted(p.name for p in (run / "checkpoints").glob("step_*"))[0])
    more = (f"base={_only(project, 'whole')}", *LORA) if runs == "adapters" else ()
    done = _refine(project, f"runs={runs}", *more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert checkpoints.latest(run / "checkpoints") == last and metrics(run) == told
    assert {p: checkpoints.weights_hash(last, p) for p in PARTS} == before


def test_adapters_alone_are_saved_and_exported_and_read_back(project, tmp_path):
    """Merged from the run, from the exported adapters by our reader, and by PEFT through load_lora: one function."""
    run = _only(project, "adapters")
    last = checkpoints.latest(run / "checkpoints")
    stored = {p: {k.split(":")[0] for k in checkpoints.read_weights(last, p)} for p in PARTS}
    assert all(k.endswith(("lora_A.weight", "lora_B.weight")) for names in stored.values() for k in names)
    assert len(stored["weights"]) == 2 * 2 * 10  # A and B, two blocks, ten layers
    code, _, err = export(project, f"checkpoint={run}", "format=lora", f"out={tmp_path / 'lora'}")
    assert (code, err) == (0, "")
    merged = rebuild(last, refiner=True)["model"]
    again = read(tmp_path / "lora")[1]
    assert all(torch.equal(again[f"model.{k}"], v) for k, v in merged.state_dict().items())
    beside = rebuild(checkpoints.latest(_only(project, "whole") / "checkpoints"), refiner=True)["model"]
    before = {k: v.clone() for k, v in beside.state_dict().items()}
    beside.load_lora(tmp_path / "lora/adapter_model.safetensors")
    beside.merge_lora()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(beside.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    assert any((before[k] - v).abs().max() > 1e-4 for k, v in merged.state_dict().items())
    code, _, err = export(project, f"checkpoint={run}", "format=diffusers", f"out={tmp_path / 'transformer'}")
    assert code == 0, err
    loaded = Refiner.from_pretrained(tmp_path, dtype=torch.float32, fps=8.0)
    assert all(torch.equal(v, merged.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert loaded.config["options"] == {"vae_scale_factors": [2, 8, 8]}
    code, _, err = export(project, f"checkpoint={run}", f"out={tmp_path / 'none'}")
    assert code == 2 and "a Refiner is written as diffusers or lora" in err
    latents, codec = torch.randn(1, 16, 5, *GRID), CosineCodec(**CODEC)
    with torch.no_grad():
        made = [
            next(Refinement(source, codec, 8.0, False, "cpu")([latents], (("a room",),)))
            for source in (run, tmp_path / "lora")
        ]
    torch.testing.assert_close(made[0], made[1], atol=1e-5, rtol=1e-4)
    assert torch.equal(made[0][:, :, 0], latents[:, :, 0]) and not torch.allclose(made[0], latents, atol=0.1)


@pytest.mark.parametrize(
    "more, told",
    [
        (["base=weights/LTX-2"], "Lightricks/LTX-2 (transformer/, 38 GB"),
        (["data.train=shards/train"], "train holds no pairs of stage-1 and true latents; vgr-prepare data=pairs"),
        (["data.val=shards/val"], "shards/val holds no pairs"),
        (["every.sample=8"], "every.sample=8: a refiner makes no videos"),
        (["model.fps=16"], "pairs/train has 8 frames a second"),
        (["model.dtype=bfloat16"], "what is trained is float32"),
        (["base=whole/run", "model.heads=4", "model.head_dim=6", *LORA], "model.heads=4 (there: 2)"),
        (["model.in_channels=8"], "the codec makes 16 channels"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_make_nothing(project, more, told):
    if not (project / "whole/run").exists():
        (project / "whole/run").symlink_to(_only(project, "whole"))
    done = _refine(project, "runs=wrong", *more)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (project / "wrong").exists()


def test_pairs_are_for_the_refiner_and_a_refiner_generates_nothing(project):
    from vgr.generator import Generator

    done = train(project, "data.train=pairs/train", "runs=wrong")
    assert done.returncode == 2 and "holds pairs of stage-1" in done.stderr
    with pytest.raises(ValueError, match="vgr-sample refiner="):
        Generator.load(_only(project, "whole"), "cpu")


def test_a_folder_of_the_real_format_is_a_base(project, tmp_path):
    """transformer/, connectors/ and Gemma 3 as LTX-2 has them, all frozen; audio is left out, adapters are trained."""
    from diffusers import LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    from tests.unit.test_refiner_weights import save_gemma3
    from tests.unit.tiny_refiner import TINY

    torch.manual_seed(0)
    folder = project / "ltx2"
    sizes = TINY | {"in_channels": 16, "out_channels": 16, "vae_scale_factors": [2, 8, 8]}
    LTX2VideoTransformer3DModel(**sizes).save_pretrained(folder / "transformer")
    save_gemma3(folder / "text_encoder")
    heads = dict(num_attention_heads=2, attention_head_dim=5, num_layers=1, num_learnable_registers=4)
    own = {f"{kind}_connector_{k}": v for kind in ("video", "audio") for k, v in heads.items()}
    LTX2TextConnectors(caption_channels=10, text_proj_in_factor=3, **own).save_pretrained(folder / "connectors")
    done = train(
        project, *WORDS, "text=ltx2", "base=ltx2", "text.folder=ltx2", "text.width=10", "text.length=8",
        "text.dtype=float32", "lora.rank=2", "lora.alpha=2", "model.text_width=10", "runs=real",
        "training.max_samples=16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_masked_chunks_have_the_loss_of_streaming_ones(project):
    """training.chunk: one call over all chunks, as each in its turn with what the ones before it left."""
    from vgr.diffusion import flow
    from vgr.diffusion.objectives import refinement

    torch.manual_seed(0)
    model = Refiner(16, 16, 2, 12, 2, fps=8.0, window=4).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    text = TextStates(torch.randn(2, 1, 3, 16), torch.ones(2, 1, 3, dtype=torch.bool))
    cond = Conditioning(Layout.chunked(2, 10, 3), text)
    noised = refinement(torch.randn(2, 32, 10, *GRID), torch.arange(2), cond.layout.chunk, 1, shift=3.0)
    with torch.no_grad():
        masked = flow.velocity_loss(model(noised.x, noised.t, cond)[0], noised.target, noised.weight)
        state, parts = model.new_state(), []
        for a, b in ((0, 4), (4, 7), (7, 10)):
            v, state = model(noised.x[:, :, a:b], noised.t[:, a:b], cond.frames(a, b), state, commit=True)
            parts.append(v)
        streamed = flow.velocity_loss(torch.cat(parts, 2), noised.target, noised.weight)
        whole = model(noised.x, noised.t, dataclasses.replace(cond, layout=Layout.whole(2, 10)))[0]
    torch.testing.assert_close(masked, streamed, atol=1e-5, rtol=1e-5)
    assert (flow.velocity_loss(whole, noised.target, noised.weight) - masked).abs().max() > 1e-4


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_perfect_refiner_validates_as_one(project, monkeypatch, chunk):
    """No loss and no distance with its own stage 1; the measures by hand in float64 for one that does nothing."""
    monkeypatch.chdir(project)
    data = ShardData("pairs/train", "pairs/val", None, 1, 4, 4)
    batches = data.val_batches(4)
    latents = torch.cat([b.latents for b in batches])
    low, high = latents.double().chunk(2, dim=1)

    class Exact:
        """Knows the batch at hand by its sink, which is true."""

        def new_state(self):
            return 0

        def __call__(self, x, t, cond, state=None, *, commit=False):
            if 0 in cond.layout.position:
                near = (high[:, :, 0] - x[:, None, :, 0]).square().flatten(2).sum(2).argmin(1)
                self.rows = near
            clean = high[self.rows][:, :, cond.layout.position].float()
            t = t[:, None, :, None, None]
            return torch.where(t > 0, (x - clean) / t.clamp_min(1e-9), 0.0), state

    text = lambda captions: TextStates(torch.zeros(len(captions), 1, 1, 1), torch.ones(len(captions), 1, 1).bool())  # noqa: E731
    args = dict(sigma_start=0.909375, reference=1, seed=1, chunk=chunk, device="cpu")
    told = validate_pairs(Exact(), text, batches, (0.3, 0.9), **args)
    stage1 = (low - high)[:, :, 1:].square().flatten(1).mean(1).sqrt()
    assert told.own_NL.max() < 1e-9 and told.distance_N3[:, 1:].max() < 1e-5
    torch.testing.assert_close(told.distance_N3[:, 0], stage1)
    values = told.metrics()
    half = 1.96 * float(stage1.std()) / len(stage1) ** 0.5
    assert values["val/gain_over_stage1_low"] == pytest.approx(float(stage1.mean()) - half, abs=1e-5)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        validate_pairs(Exact(), text, [dataclasses.replace(batches[0], latents=batches[0].latents[:1], keys=("a",))],
                       (0.3,), **args)  # fmt: skip
