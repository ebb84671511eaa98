"""What each doubtful point of the world model changes in a trained model: the held-out loss with the switch thrown.

    python -m benchmarks.switches runs/world_model/tiny/seed1

Fixed clips, noise and levels as in validation; the change is paired over clips. Writes nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vgr.data.modules import ShardData
from vgr.models.world_model import WorldModel
from vgr.training import checkpoints
from vgr.training.rebuild import rebuild
from vgr.training.validation import validate

LEVELS = (0.2, 0.5, 0.8)
# Point of the spec, constructor arguments that differ from the run's.
SWITCHES = {
    "4.2 camera renormalisation in softmax blocks": "cam_renorm_softmax",
    "4.2 camera renormalisation in gated delta blocks": "cam_renorm_gdn",
    "3.7 softmax in bf16": "softmax_bf16",
    "2.2 times truncated to thousandths": "truncate_times",
    "12.9 camera keys filtered inside their chunk": "cam_filter_isolated",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clips", type=int, default=32)
    args = parser.parse_args()
    checkpoint = checkpoints.resolve(args.run)
    config = checkpoints.read_state(checkpoint)["config"]
    parts = rebuild(checkpoint)
    own, codec = parts["model"].eval(), parts["codec"]
    data = ShardData(config["data"]["train"], config["data"]["val"], None, 0, 8, 8, config["data"]["frames"],
                     val_clips=args.clips)  # fmt: skip
    batches = data.val_batches(8)
    chunk = config["training"]["chunk"]
    variants = {
        name: {key: not own.config[key]}
        for name, key in SWITCHES.items()
        if chunk is not None or key != "cam_filter_isolated"
    }
    variants["3.7 main softmax scaled as if padded to 128"] = {"softmax_scale": 128**-0.5}
    if chunk is not None:
        variants["12.2 sink of one chunk and a window of one"] = {"sink": 1, "window": 1}

    def losses(model: WorldModel) -> torch.Tensor:
        settings = {"seed": 0, "stride": codec.stride[0], "chunk": chunk, "device": "cpu"}
        return validate(model, parts["text"].eval(), batches, LEVELS, **settings).own_NL.mean(1)

    base = losses(own)
    print(f"{args.run}, {len(base)} clips: loss {base.mean():.5f}")
    for name, change in variants.items():
        model = WorldModel(**{**own.config, **change}).eval()
        model.load_state_dict(own.state_dict())
        gap = losses(model) - base
        half = 1.96 * float(gap.std()) / len(gap) ** 0.5
        print(f"{name} ({change}): {gap.mean():+.5f} +- {half:.5f}")


if __name__ == "__main__":
    main()
