"""What the benchmarks of the causal video model's stories count, on videos whose cuts are known."""

import numpy as np
import pytest
import torch

from benchmarks.few_steps import made, ways
from benchmarks.shots import cut_scores
from vgr.data.stories import StorySource
from vgr.diffusion.rollout import Session
from vgr.models.causal_video import CausalVideo
from vgr.models.codec import CosineCodec
from vgr.models.text import ByteTextEncoder
from vgr.seeding import normal_like
from vgr.types import Cameras, VideoBatch


def test_cut_scores_count_told_cuts_found_and_cuts_elsewhere():
    source = StorySource(size_hw=(32, 32))
    clip, other = source.clip(1, "val", 0), source.clip(1, "val", 1)
    told = [shot["start"] for shot in clip.shots[1:]]
    true = cut_scores(clip.frames, clip.shots)
    assert true["sca"] == 1.0 and true["told_found"] == 1.0 and true["elsewhere"] == 0.0
    still = cut_scores(clip.frames[:1].repeat(61, 0), clip.shots)
    count = len(clip.shots)
    assert still["sca"] == still["floor"] == pytest.approx(np.exp(-(count - 1) / count))
    assert still["told_found"] == 0.0 and still["elsewhere"] == 0.0
    # The last shot replaced by what was there before, and a cut put where none was told.
    frames = clip.frames.copy()
    frames[told[-1] :] = frames[told[-1] - 1]
    at = next((s["start"] + s["end"]) // 2 for s in clip.shots[:-1] if s["end"] - s["start"] > 6)
    frames[at:] = 255 - frames[at:]
    mixed = cut_scores(frames, clip.shots)
    assert mixed["told_found"] == pytest.approx((len(told) - 1) / len(told)) and mixed["elsewhere"] == 1.0
    assert still["sca"] < mixed["sca"] < 1.0
    assert cut_scores(other.frames, clip.shots)["sca"] < 1.0


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    text = ByteTextEncoder(width=16, length=16, layers=1, heads=2)
    codec = CosineCodec((2, 8, 8), (1,), (1,))
    model = CausalVideo(codec.channels, 24, heads=2, layers=2, ffn_width=32, text_width=16, text_length=16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sampling = {"sigmas": [1.0, 0.8, 0.0], "renoise": True, "shift": 3.0}
    return {"model": model.eval(), "text": text.eval(), "codec": codec, "chunk": 3, "sampling": sampling}


@torch.no_grad()
def test_few_steps_make_a_story_as_a_session_does(run):
    """The videos compared are what a director gets who says each shot when it is its turn."""
    captions, starts = ("Kim in the blue room", "Bo in the red room"), 7
    shot = (torch.arange(7) >= (starts + 1) // 2).long()[None]
    cameras = Cameras(torch.eye(4).expand(1, 13, 4, 4), torch.full((1, 13, 4), 0.5))
    clean = torch.randn(1, run["codec"].channels, 7, 4, 4)
    batch = VideoBatch(clean, cameras, torch.tensor([8.0]), (captions,), shot, ("a",), torch.tensor([3]))
    sigmas = torch.tensor(run["sampling"]["sigmas"], dtype=torch.float64)
    latents = made(run, batch, sigmas, True)
    assert (latents[:, :, 0] - clean[:, :, 0]).abs().min() > 0  # nothing of the true first frame is given

    session = Session(
        run["model"], run["codec"], run["text"], sigmas=sigmas, chunk=3, fps=8.0, size_hw=(32, 32), cut_prefix="",
        renoise=True,
    )
    session._noise = lambda position, step: normal_like(clean, 0, f"few steps {step}", batch.position)[:, :, position]
    session.append(captions[0], 0.75)
    session.append(captions[1], 0.75, cut=True)
    directed = torch.cat(list(session.frames()))
    video = run["codec"].decode(latents)[0].clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 3, 0)
    assert directed.shape == video.shape == (13, 32, 32, 3)
    assert (directed.int() - video.int()).abs().max() <= 1 and video.float().std() > 1
    switched = made(run, VideoBatch(**{**vars(batch), "shot": torch.zeros_like(shot)}), sigmas, True)
    assert torch.equal(switched[:, :, :4], latents[:, :, :4]) and not torch.allclose(switched, latents)


def test_teachers_are_sampled_their_own_way_and_the_students(run):
    teacher = {**run, "sampling": {"sigmas": None, "shift": 6.0}}
    rows = ways({"teacher": teacher, "student": run}, 12)
    assert list(rows) == ["teacher, 12 steps", "teacher, own grid", "teacher, as a student", "student"]
    assert [len(way[1]) - 1 for way in rows.values()] == [12, 2, 2, 2]
    assert [way[2] for way in rows.values()] == [False, False, True, True]
    with pytest.raises(ValueError, match="none of the runs is a student"):
        ways({"teacher": teacher}, 12)
