"""The planner: FLOP and bytes of a step against arithmetic and against a real step, and what is made of them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from vgr import command, planner, trainer
from vgr.models.causal_video import CausalVideo
from vgr.nn.attention import Chunks, DualAttention
from vgr.nn.rope import rope_table
from vgr.training import step_cost
from vgr.training.step_cost import StepCost, step_costs, step_flops
from vgr.types import Conditioning, Layout, TextStates

WORLD = ["experiments=world_model/tiny", "data.frames=5", "data.micro_batch=2", "model.width=64"]


def composed(*overrides):
    return command.compose("train", [*WORLD, *overrides])


def batch_of(cfg):
    return planner.batch_of(cfg, (48, 64))


def counted(run):
    """FLOP of what `run` does, as a step's are counted."""
    with step_cost._Tally() as tally:
        run()
    return tally.flop[False], tally.flop[True]


@pytest.mark.parametrize("kind", ["gdn", "softmax"])
def test_attention_is_counted_as_its_equations_have_it(kind):
    width, heads, frames, cells = 32, 2, 6, 5
    attention, tokens = DualAttention(width, heads, kind, conv_kernel=4), frames * cells
    x, head = torch.randn(1, frames, cells, width), width // heads
    table = rope_table(torch.arange(frames), 1, cells, head)
    chunks = Chunks((0, 1), (4, 2))
    forward, _ = counted(lambda: attention(x, table, None, chunks))
    projections = 2 * tokens * width * (3 * width + 2 * width)
    if kind == "softmax":  # later chunks read earlier ones, and nothing hidden is computed
        pairs = (4 * 4 + 2 * 6) * cells**2
        assert forward == projections + 2 * 2 * pairs * width
        return
    gates = 2 * width * heads * (tokens + frames)
    filters = 2 * tokens * width * 4
    # K^T K twice, K^T V and Q M; the normaliser's reading. States pass one frame on, both ways, but between chunks.
    summaries = 2 * tokens * heads * head * (3 * head) + 2 * tokens * heads * head * (head + 1)
    scans = 2 * heads * head**2 * (head + 1) * ((frames - 1) + (frames - 2))
    assert forward == pytest.approx(projections + gates + filters + summaries + scans, rel=0.02)


def test_masked_chunks_of_a_packed_call_count_the_pairs_that_are_seen():
    torch.manual_seed(0)
    model = CausalVideo(in_channels=4, width=32, heads=2, layers=1, ffn_width=64, text_width=16, text_length=8)
    cond = Conditioning(Layout.chunked(1, 7, 3), TextStates(torch.randn(1, 1, 8, 16), torch.ones(1, 1, 8, dtype=bool)))
    x, t = torch.randn(1, 4, 7, 4, 4), torch.rand(1, 7)
    alone = counted(lambda: model(x, t, cond))[0]
    packed = counted(lambda: model(torch.cat([x, x], 2), torch.cat([t, t], 1), cond.packed()))[0]
    cells, seen = 4, (4 * 4 + 3 * 7) * 4 * 4  # of chunks of four and three frames
    per_token = (packed - alone - 4 * 32 * seen) / (7 * cells)
    linear = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 32 + 2 * 32 * 64 + 2 * 16 * 32 + 9 * 2 * 32)
    times = 2 * (256 * 32 + 32 * 32 + 6 * 32 * 32) / cells
    assert per_token == pytest.approx(linear + times, rel=0.001)


def test_grouped_convolutions_cost_twice_their_forward_pass_backward():
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    forward, backward = counted(lambda: conv(x).sum().backward())
    assert forward == 2 * 2 * 8 * 25 * 9 and backward == 2 * forward


def test_a_step_without_numbers_is_the_real_step():
    cfg = composed("model.layers=3", "model.softmax_every=0")
    module, batch = planner.module_of(cfg, "cpu"), batch_of(cfg)
    plain, lean = step_costs(planner.module_of(cfg), batch, bf16=False)
    for checkpointing, cost in ((False, plain), (True, lean)):
        module.model.activation_checkpointing = checkpointing
        module.train()
        with step_cost._Tally() as tally:
            loss = module.training_step(batch, 0)
            saved = tally.alive
            loss.backward()
        module._pending.clear()
        assert tally.flop[False] == cost.forward
        assert tally.flop[True] + tally.scores == pytest.approx(cost.backward + cost.again, rel=1e-9)
        assert saved == pytest.approx(cost.saved, rel=0.001)
        gradients = planner.size(p for p in module.parameters() if p.requires_grad)
        assert cost.backward_peak <= tally.peak[True] <= cost.backward_peak + gradients
        module.zero_grad()
    assert lean.backward == plain.backward and lean.again > 0.5 * plain.forward
    assert lean.saved < 0.5 * plain.saved
    assert step_flops(module, batch) == plain.forward + plain.backward


def test_blocks_left_out_are_counted_all_the_same(monkeypatch):
    module, batch = planner.module_of(cfg := composed("model.layers=6", "model.softmax_every=6")), batch_of(cfg)
    few = step_cost._counted(module, batch, True, True)
    rows, runs = step_cost._rows, []
    monkeypatch.setattr(step_cost, "_rows", lambda module: runs.append(module) or [])
    whole = step_cost._counted(module, batch, True, True)
    assert len(rows(module)[0]) == 6 and runs
    assert few.forward == whole.forward and few.backward == pytest.approx(whole.backward, rel=1e-6)
    assert few.forward_peak == pytest.approx(whole.forward_peak, rel=0.05)
    assert few.saved == whole.saved and few.backward_peak == pytest.approx(whole.backward_peak, rel=0.01)


def test_what_is_frozen_costs_half_backward_and_holds_no_moments():
    plain = planner.module_of(composed())
    cfg = composed("init_from=x", "lora.rank=4", "lora.targets=[qkv]")
    adapters, batch = planner.module_of(cfg), batch_of(cfg)
    whole, part = (step_cost._counted(m, batch, False, False) for m in (plain, adapters))
    assert whole.backward == pytest.approx(2 * whole.forward, rel=0.03)
    assert part.backward < 1.2 * part.forward
    held = planner.held(adapters, planner.Layout())
    trained = planner.size(p for p in adapters.parameters() if p.requires_grad)
    assert held["moments"] == 2 * held["gradients"] == 2 * trained
    assert held["average"] == trained  # frozen parameters are their own average


def test_networks_of_self_forcing_are_all_held_and_their_turns_are_counted():
    cfg = command.compose(
        "train", ["experiments=causal_video/self_forcing", "size=story_tiny", "data.frames=9", "data.micro_batch=1",
                  "model.width=32", "model.layers=3"],
    )  # fmt: skip
    module = planner.module_of(cfg)
    held, student = planner.held(module, planner.Layout()), planner.size(module.model.parameters())
    assert held["critic"] == student and held["average"] == student
    assert held["gradients"] == planner.size([*module.model.parameters(), *module._follower().parameters()])
    batch = planner.batch_of(cfg, (64, 64))
    often = step_flops(module, batch)
    module.critic_steps *= 4
    seldom = step_flops(module, batch)
    assert 0.2 * often < seldom < often


def test_layouts_deal_what_is_held():
    module = planner.module_of(composed())
    trainer = {"devices": 4, "num_nodes": 2, "accumulate_grad_batches": 1, "replicas": 2, "context": 2}
    dealt = planner.layout({**trainer, "strategy": "fsdp"})
    assert dealt == planner.Layout(8, 4, 2, "fsdp", 1)
    whole, part = planner.held(module, planner.Layout()), planner.held(module, dealt)
    assert all(part[k] == v / 4 for k, v in whole.items()) and part["gathered block"] < 3 * whole["weights"]
    every = planner.held(module, planner.layout({**trainer, "strategy": "auto"}))
    assert every == whole | {"reduction buckets": whole["gradients"]}


def test_gradients_arrive_as_what_is_saved_goes():
    held, cost = {"weights": 10.0, "gradients": 5.0}, StepCost(1.0, 2.0, 0.0, 8.0, 7.0, 9.0)
    assert planner.peak(held, cost, planner.Layout(), at_once=False) == 10 + 7 + 2
    assert planner.peak(held, cost, planner.Layout(), at_once=True) == 10 + 5 + 9
    assert planner.peak(held, replace(cost, saved=1.0, backward_peak=3.0), planner.Layout(), at_once=False) == 10 + 8
    assert planner.peak(held, cost, planner.Layout(context=2), at_once=True) == 10 + 5 + 4.5


def test_a_plan_tells_its_numbers_and_refuses_what_cannot_fit(monkeypatch):
    cfg = composed("plan='h200 48x64'")
    lines = []
    planner.tell(cfg, lines.append)
    (told,) = lines
    for line in ("H200, 150 GB, bf16-mixed; one device", "parameters", "activations", "checkpoint", "s a step"):
        assert line in told
    found = planner.make(cfg, trainer.settings(cfg), (48, 64))
    monkeypatch.setattr(planner, "make", lambda *_: found)
    planner.tell(composed("plan='cpu 48x64'"), lines.append)
    assert "s a step" not in lines[1]  # whose peak nobody knows
    monkeypatch.setitem(planner.MEMORY, "H200", planner.RESERVED + 1e6)
    told = r"asked of H200.*activations .*Try trainer.strategy=fsdp, .*activation_checkpointing"
    with pytest.raises(ValueError, match=told):
        planner.tell(cfg, lines.append)


def test_a_plan_needs_a_known_device_and_a_size():
    assert planner.asked("H100 704x1280") == ("H100", (704, 1280))
    assert planner.asked("a100-40") == ("A100-40", None)
    for wrong in ("tpu", "h200 704", "h200 wide"):
        with pytest.raises(ValueError, match="plan="):
            planner.asked(wrong)
    with pytest.raises(ValueError, match='holds no shards.*plan="h200 704x1280"'):
        planner.tell(composed("plan=h200", "shards=nowhere"), print)
