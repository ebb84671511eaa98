"""Turning one world model into the next stage's: what is dropped, what starts anew, what is copied (spec 5.3).

    latents   another codec: patch embedding and output projection start anew (VAE swap)
    gdn       gated delta blocks from linear attention: gates and filter start as the identity (spec 3.2)
    softmax   every n-th gated delta block becomes softmax: gates and filter go, projections stay (spec 3.7)
    camera    the camera branch starts as a copy of the main one, without effect (spec 4.2, re-copied after loading)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

_GDN = r"blocks\.\d+\.attn\.(A_log|dt_bias|conv_k|conv_k_cam|beta_proj\.\w+|gate_proj\.\w+)"
_CAMERA = (
    r"blocks\.\d+\.(attn\.(qkv_cam\.\w+|[qk]_norm_cam\.weight|conv_k_cam|out_proj_cam\.\w+)|plucker_proj\.\w+)"
    r"|plucker_embedder\.\w+"
)
STEPS = {"latents": r"x_embedder\.\w+|final_linear\.\w+", "gdn": _GDN, "softmax": _GDN, "camera": _CAMERA}


def convert(stored: dict[str, Tensor], fresh: dict[str, Tensor], steps: Sequence[str]) -> dict[str, Tensor]:
    """The next stage's tensors: `stored` of the last one where names and shapes agree, else what `steps` allow.

    fresh: the new model's own tensors as initialised. Raises ValueError for an unknown step, and for a difference
    that no step accounts for, naming it.
    """
    unknown = set(steps) - set(STEPS)
    if unknown:
        raise ValueError(f"surgery={', '.join(sorted(unknown))}: choose from {', '.join(STEPS)}")
    allowed = re.compile("|".join(f"(?:{STEPS[s]})" for s in steps) or r"(?!)")
    anew = re.compile("|".join(f"(?:{STEPS[s]})" for s in steps if s in ("latents", "camera")) or r"(?!)")
    differ = [n for n in {*stored, *fresh} if n not in stored or n not in fresh or stored[n].shape != fresh[n].shape]
    refused = sorted(n for n in differ if not allowed.fullmatch(n))
    if refused:
        raise ValueError(
            f"the weights do not fit the model in {len(refused)} tensors ({', '.join(refused[:3])}); surgery="
            f"[{', '.join(steps)}] does not account for them: choose from {', '.join(STEPS)}, or change the model"
        )
    kept = {n: stored[n] if n not in differ and not anew.fullmatch(n) else fresh[n] for n in fresh}
    return _camera_from_main(kept) if "camera" in steps else kept


def _camera_from_main(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Camera projections, norms and filters as copies of the main branch's; biases and the output are zero."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith((".attn.qkv.weight", ".attn.q_norm.weight", ".attn.k_norm.weight", ".attn.conv_k")):
            head, _, kind = name.partition(".attn.")
            first, _, rest = kind.partition(".")
            if (copy := f"{head}.attn.{first}_cam{'.' + rest if rest else ''}") in tensors:
                result[copy] = tensor.clone()
        if re.search(r"attn\.(qkv_cam\.bias|out_proj_cam\.\w+)$|^plucker_embedder\.", name):
            result[name] = torch.zeros_like(tensor)
    return result
