"""Streaming: chunk after chunk from a student that keeps a state (SANA-WM section 3.2, spec 6.3), and sessions."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgr.diffusion import flow
from vgr.diffusion.pyramid import image_noised
from vgr.diffusion.samplers import FrameNoise, chunk_bounds, few_step, frame_noise
from vgr.types import (
    Cameras,
    Codec,
    Conditioning,
    Denoiser,
    HistoryBlock,
    LatentCameras,
    Layout,
    TextEncoder,
    latents_holding,
    raw_frames,
)


@torch.no_grad()
def stream(
    denoiser: Denoiser,
    state: Any,
    cond: Conditioning,
    sigmas: Tensor,
    noise: FrameNoise,
    first_frame: Tensor | None = None,
    *,
    renoise: bool = False,
    exit_step: int | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """For each chunk of `cond.layout`, its clean latents (B,C,T,H,W) and the state that holds it.

    A chunk is `few_step` (see there for sigmas, noise, renoise and exit_step) and one clean pass at t = 0 that
    commits it; nothing is kept from one chunk to the next but the state. first_frame (B,C,1,H,W) is held at t = 0
    in the video's first chunk. ValueError where first_frame meets a cond that starts later in the video.
    """
    if first_frame is not None and int(cond.layout.position[0]) != 0:
        at = int(cond.layout.position[0])
        raise ValueError(f"first_frame belongs to latent frame 0, but cond starts at frame {at}; leave it out")
    for a, b in chunk_bounds(cond.layout):
        part = cond.frames(a, b)
        first = first_frame if a == 0 else None
        latents, state = few_step(denoiser, noise, part, sigmas, state, first, renoise=renoise, exit_step=exit_step)
        zero = torch.zeros(latents.shape[0], latents.shape[2], device=latents.device)
        _, state = denoiser(latents, zero, part, state, commit=True)
        yield latents, state


@dataclass(frozen=True)
class Exit:
    """The last call of a chunk before it was committed, as a rollout made it: enough to make it again."""

    x: Tensor
    t: Tensor
    cond: Conditioning
    state: Any

    def again(self, denoiser: Denoiser) -> Tensor:
        """The chunk's clean latents (B,C,T,H,W), now with a graph: the rollout's own, bit by bit."""
        v, _ = denoiser(self.x, self.t, self.cond, self.state)
        return flow.clean_estimate(self.x, v.to(self.x.dtype), self.t.to(self.x.dtype))


def self_forced(
    denoiser: Denoiser,
    state: Any,
    cond: Conditioning,
    sigmas: Tensor,
    noise: FrameNoise,
    first_frame: Tensor | None = None,
    *,
    exit_step: int,
) -> tuple[Tensor, list[Exit], Any]:
    """Self-forcing's rollout (spec 6.2) without a gradient: clean latents (B,C,T,H,W), each chunk's exit, the state.

    Arguments are `stream`'s. Chunks touch each other through detached commits only, so the gradient of the latents
    is that of the exits made again one by one, with one graph alive at a time. A state is immutable: an exit's is a
    prefix of the last, and is let go with it. A denoiser whose states also hold what it can read again from their
    memory has `lean(state)`, which leaves that out.
    """
    exits: list[Exit] = []
    lean = getattr(denoiser, "lean", lambda state: state)
    last: Exit | None = None

    def recorded(
        x: Tensor, t: Tensor, part: Conditioning, state: Any = None, *, commit: bool = False
    ) -> tuple[Tensor, Any]:
        nonlocal last
        if commit:
            exits.append(last)
        else:
            last = Exit(x, t, part, lean(state))
        return denoiser(x, t, part, state, commit=commit)

    chunks = stream(recorded, state, cond, sigmas, noise, first_frame, renoise=True, exit_step=exit_step)
    pieces, states = zip(*chunks)
    return torch.cat(pieces, dim=2), exits, states[-1]


def image_history(
    codec: Codec, images: Tensor, seeds: Sequence[int], noise: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """What a video of clips of their own goes on from, of images (B,3,1,H,W): `Streamed.new_state`'s latents.

    Each row's noise, of a share within `noise`, is a function of its seed alone (warp adapter, spec 1.2, 1.3).
    """
    still = codec.encode(images.expand(-1, -1, raw_frames(codec.clip, codec.stride[0]), -1, -1))[:, :, -1:]
    return image_noised(codec.encode(images), still, seeds, noise)


class Session:
    """One video made as it is directed: `append` says what comes next, `frames` yields it chunk by chunk.

    denoiser: chunk-causal, with `new_state()`; codec: with `stream()`; text: a `TextEncoder`. sigmas: its times
    (`timesteps.few_step_sigmas`); chunk: latent frames of a chunk; fps: raw frames a second; size_hw: pixels.
    first_frame (H,W,3) uint8: the image the video starts from. group_cameras: None for a model without cameras, else
    `vgr.geometry.cameras.group_by_latent`. cut_prefix: what the model reads before the prompt in the first chunk after
    a cut ("" if a new prompt is cut enough), None for a model that knows no cuts. story: a caption of the whole, read
    before every prompt. renoise: see `samplers.few_step`. evidence: gives each chunk its `cond.history` as it is about
    to be made, from its conditioning and the raw frames (n,H,W,3) uint8 of the one before, at a video's start its image
    or None. Where the codec has clips, chunks are these, and the image is not a frame of the first one but what it goes
    on from, with a share of noise within `image_noise`. The noise depends on `seed` and the frame alone, so the video
    does not depend on when its pieces were appended. Autocast is the caller's; codec, cameras and evidence run outside
    it. ValueError for parts that cannot stream or take no evidence, and sizes that do not fit.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        codec: Codec,
        text: TextEncoder,
        *,
        sigmas: Tensor,
        chunk: int,
        fps: float,
        size_hw: tuple[int, int],
        seed: int = 0,
        first_frame: Tensor | None = None,
        group_cameras: Callable[[Cameras, int], LatentCameras] | None = None,
        cut_prefix: str | None = None,
        story: str = "",
        renoise: bool = False,
        evidence: Callable[[Conditioning, Tensor | None], tuple[HistoryBlock, ...]] | None = None,
        image_noise: tuple[float, float] = (0.0, 0.0),
        device: torch.device | str = "cpu",
    ) -> None:
        for part, needed in ((denoiser, "new_state"), (codec, "stream")):
            if not hasattr(part, needed):
                name = getattr(part, "__name__", type(part).__name__)
                raise ValueError(f"a session streams, and {name} has no {needed}(); make its videos whole (vgr-sample)")
        if evidence is not None and not getattr(denoiser, "takes_history", False):
            name = getattr(denoiser, "__name__", type(denoiser).__name__)
            raise ValueError(f"evidence is given, but {name} does not read cond.history; leave it out")
        if chunk < 1 or not 0 < fps < float("inf"):
            raise ValueError(f"chunk={chunk}, fps={fps}: a session needs chunk >= 1 latent frame and fps > 0")
        if codec.clip not in (None, chunk):
            raise ValueError(f"chunk={chunk}, but the codec's clips are {codec.clip} latent frames: one is the other")
        self.stride, height, width = codec.stride
        if size_hw[0] % height or size_hw[1] % width:
            raise ValueError(f"size_hw={tuple(size_hw)} must be multiples of the codec's stride ({height}, {width})")
        if first_frame is not None and (first_frame.shape != (*size_hw, 3) or first_frame.dtype != torch.uint8):
            raise ValueError(
                f"first_frame must be ({size_hw[0]}, {size_hw[1]}, 3) uint8, "
                f"got {tuple(first_frame.shape)} {first_frame.dtype}; crop or resize it"
            )
        self.denoiser, self.codec, self.text = denoiser, codec, text
        self.sigmas, self.chunk, self.fps, self.renoise = sigmas, chunk, fps, renoise
        self.group_cameras, self.cut_prefix, self.story, self.evidence = group_cameras, cut_prefix, story, evidence
        self.device = torch.device(device)
        shape_CHW = (codec.channels, size_hw[0] // height, size_hw[1] // width)
        self._noise = frame_noise([seed], shape_CHW, device)
        self._start = [seed], image_noise
        self._state = denoiser.new_state()
        self._decoder = codec.stream()
        self._image = first_frame
        self._before = None if first_frame is None else first_frame[None]
        self._origin: Cameras | None = None
        self._latents = self._shot = 0
        self._queue: deque[Conditioning] = deque()

    @property
    def started(self) -> bool:
        """Whether anything has been appended: from then on pieces have no first image of their own."""
        return self._latents > 0

    def frames_in(self, seconds: float) -> int:
        """Raw frames that `append(..., seconds)` would add: whole chunks, and the first image once.

        ValueError naming the nearest duration where no number of chunks is within half a frame of `seconds`.
        """
        clip, wanted = self.codec.clip, seconds * self.fps
        unit = self.chunk * self.stride if clip is None else raw_frames(clip, self.stride)
        chunks = max(1, round(wanted / unit)) if abs(wanted) < float("inf") else 1
        if not abs(wanted - chunks * unit) <= 0.5:
            raise ValueError(
                f"seconds={seconds:g} is {wanted:g} frames at {self.fps:g} a second, and this model makes chunks of "
                f"{unit} frames ({unit / self.fps:g} s); the nearest that fits is seconds={chunks * unit / self.fps:g}"
            )
        return chunks * unit + (self._latents == 0 and clip is None)

    @torch.no_grad()
    def append(self, prompt: str, seconds: float, cut: bool = False, camera: Cameras | None = None) -> None:
        """Direct the next `seconds`; they follow what was appended before, also while `frames` is being read.

        camera (1,F): the `frames_in(seconds)` new frames, in one world for the whole session. cut: a new shot begins.
        ValueError, and nothing appended, for what this model or this moment cannot take.
        """
        frames = self.frames_in(seconds)
        self._check(frames, cut, camera)
        camera = None if camera is None else camera.to(self.device)
        prompt = f"{self.story} {prompt}" if self.story else prompt  # as `data.modules` tells it in training
        clip = self.codec.clip
        new = -(-frames // self.stride) if clip is None else latents_holding(frames, self.stride, clip)
        total = self._latents + new
        self._shot += cut
        layout = Layout.chunked(1, total, self.chunk, clips=clip is not None).frames(self._latents, total)
        layout = dataclasses.replace(layout, shot=layout.shot + self._shot)
        grouped = None if camera is None else self._grouped(camera)
        cond = Conditioning(layout, self.text(((prompt,),)), grouped).to(self.device)
        parts = [cond.frames(a, b) for a, b in chunk_bounds(layout)]
        if cut:
            parts[0] = dataclasses.replace(parts[0], text=self.text(((self.cut_prefix + prompt,),)))
            parts[0] = parts[0].to(self.device)
        if camera is not None and self._origin is None:
            self._origin = camera.frames(0, 1)
        self._latents = total
        self._queue.extend(parts)

    def _check(self, frames: int, cut: bool, camera: Cameras | None) -> None:
        if cut and self.cut_prefix is None:
            raise ValueError("cut=True: this model knows one continuous shot (cut_prefix is None); use cut=False")
        if cut and self._latents == 0:
            raise ValueError("cut=True: the first piece has nothing to cut from; use cut=False")
        if camera is not None and self.group_cameras is None:
            raise ValueError("camera is given, but this model takes no camera (group_cameras is None); leave it out")
        if self.group_cameras is None:
            return
        given = None if camera is None else (tuple(camera.c2w.shape), tuple(camera.intrinsics.shape))
        if given != ((1, frames, 4, 4), (1, frames, 4)):
            raise ValueError(
                f"camera={given}: this model needs the cameras of the {frames} frames that are appended, c2w "
                f"(1,{frames},4,4) and intrinsics (1,{frames},4); frames_in(seconds) says how many frames that is"
            )

    def _grouped(self, camera: Cameras) -> LatentCameras:
        with torch.autocast(self.device.type, enabled=False):
            if self._origin is None:
                return self.group_cameras(camera, self.stride)
            # Behind the session's first frame, later frames group as they would in the whole video.
            c2w = torch.cat([self._origin.c2w, camera.c2w], dim=1)
            intrinsics = torch.cat([self._origin.intrinsics, camera.intrinsics], dim=1)
            grouped = self.group_cameras(Cameras(c2w, intrinsics), self.stride)
        return grouped.frames(1, grouped.c2w.shape[1])

    def frames(self) -> Iterator[Tensor]:
        """Raw frames (F,H,W,3) uint8 on the CPU, one piece a chunk, until nothing appended is left.

        Append and call it again, or append while reading. A chunk that fails stays queued.
        """
        while self._queue:
            yield self._next()

    @torch.no_grad()
    def _next(self) -> Tensor:
        state, first = self._begun()
        cond = self._queue[0]
        if self.evidence is not None:
            with torch.autocast(self.device.type, enabled=False):
                cond = dataclasses.replace(cond, history=self.evidence(cond, self._before)).to(self.device)
        parts = (self.denoiser, state, cond, self.sigmas, self._noise, first)
        latents, state = next(stream(*parts, renoise=self.renoise))
        with torch.autocast(self.device.type, enabled=False):
            video = self._decoder(latents)
        self._state, self._image = state, None
        self._queue.popleft()
        frames = ((video[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu()
        self._before = frames
        return frames

    def _begun(self) -> tuple[Any, Tensor | None]:
        """The next chunk's state and given first latent frame: what the image is depends on the codec."""
        if self._image is None:
            return self._state, None
        with torch.autocast(self.device.type, enabled=False):
            video = self._image.to(self.device).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1.0
            if self.codec.clip is None:
                return self._state, self.codec.encode(video)
            return self.denoiser.new_state(*image_history(self.codec, video, *self._start)), None
