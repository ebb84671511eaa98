"""The original release's files, made up with its exact keys and shapes: at full size on the meta device, and narrow
with random numbers, where our model gives what diffusers' port gives with the same tensors."""

import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vgr.models import weights, world_model_weights
from vgr.models.world_model import WorldModel

FULL = {"d": 2240, "n": 20, "layers": 20, "every": 4, "c": 128, "text": 2304, "raw": 8, "hidden": 6720, "taps": 4}
NARROW = {"d": 48, "n": 2, "layers": 4, "every": 2, "c": 4, "text": 24, "raw": 8, "hidden": 144, "taps": 4}


def released_shapes(d, n, layers, every, c, text, raw, hidden, taps):
    """Spec 10.2's table, written out on its own; pos_embed's shape is not published."""
    shapes = {
        "pos_embed": (1, 484, d),
        "y_embedder.y_embedding": (300, text),
        "attention_y_norm.weight": (d,),
        "final_layer.scale_shift_table": (2, d),
    }

    def layer(name, *weight):
        shapes.update({f"{name}.weight": weight, f"{name}.bias": weight[:1]})

    layer("x_embedder.proj", d, c, 1, 1, 1)
    layer("plucker_embedder.proj", d, 6 * raw, 1, 1, 1)
    layer("raymap_embedder.proj", d, 3, 1, 1, 1)
    layer("t_embedder.mlp.0", d, 256)
    layer("t_embedder.mlp.2", d, d)
    layer("t_block.1", 6 * d, d)
    layer("y_embedder.y_proj.fc1", d, text)
    layer("y_embedder.y_proj.fc2", d, d)
    layer("final_layer.linear", c, d)
    for i in range(layers):
        b = f"blocks.{i}."
        for name in ("plucker_proj", "attn.proj", "attn.output_gate", "attn.out_proj_cam", "cross_attn.q_linear",
                     "cross_attn.proj", *(f"attn.{p}_proj_cam" for p in "qkv")):  # fmt: skip
            layer(b + name, d, d)
        layer(b + "attn.beta_proj", n, d)
        layer(b + "attn.gate_proj", n, d)
        layer(b + "cross_attn.kv_linear", 2 * d, d)
        layer(b + "mlp.inverted_conv.conv", 2 * hidden, d, 1, 1)
        layer(b + "mlp.depth_conv.conv", 2 * hidden, 1, 3, 3)
        for name in ("attn.q_norm", "attn.k_norm", "attn.q_norm_cam", "attn.k_norm_cam", "cross_attn.q_norm",
                     "cross_attn.k_norm"):  # fmt: skip
            shapes[f"{b}{name}.weight"] = (d,)
        shapes |= {
            f"{b}scale_shift_table": (6, d),
            f"{b}attn.qkv.weight": (3 * d, d),
            f"{b}attn.A_log": (n,),
            f"{b}attn.dt_bias": (n,),
            f"{b}attn.recall_gate": (1,),
            f"{b}mlp.point_conv.conv.weight": (d, hidden, 1, 1),
            f"{b}mlp.t_conv.weight": (d, d, 3, 1),
        }
        if (i + 1) % every:
            shapes |= {f"{b}attn.conv_k.weight": (d, 1, taps), f"{b}attn.conv_k_cam.weight": (d, 1, taps)}
    return shapes


def random_release(seed=0, **sizes):
    """Random tensors of a released file: scales near one, biases small, matrices of unit gain."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in released_shapes(**{**NARROW, **sizes}).items():
        noise = torch.randn(shape, generator=g)
        if "norm" in name:
            tensors[name] = 1.0 + 0.1 * noise
        else:
            tensors[name] = 0.1 * noise if len(shape) < 2 else noise / noise[0].numel() ** 0.5
    return tensors


def _count(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_full_size_has_the_published_keys_and_counts():
    """872 keys; ours has 738 tensors of 2,661,343,088 numbers, the file 2,662,491,668 beside pos_embed.

    What we do not build has no effect on the output: the null prompt (300 x 2304), the ray map's embedder
    (3 x 2240 + 2240), a recall gate a block (20), the gates of five softmax blocks (5 x (2 x (20 x 2240 + 20) + 40)).
    Camera q, k and v are one matrix here and three there, so 40 of our tensors are 120 of the file's.
    """
    shapes = released_shapes(**FULL)
    assert len(shapes) == 872 and sum(k.startswith("blocks.") for k in shapes) == 850
    with torch.device("meta"):
        model = WorldModel()
        released = {name: torch.empty(shape) for name, shape in shapes.items()}
    own = model.state_dict()
    assert len(own) == 738 and sum(t.numel() for t in own.values()) == 2_661_343_088
    in_file = _count(shapes) - _count({"pos_embed": shapes["pos_embed"]})
    assert in_file == 2_662_491_668 and round(in_file / 1e6, 1) == 2662.5
    assert in_file - 2_661_343_088 == 300 * 2304 + 4 * 2240 + 20 + 5 * (2 * (20 * 2240 + 20) + 40)
    config, tensors = world_model_weights.from_original({}, released)
    assert config == {**{k: model.config[k] for k in config}, "softmax_bf16": True}
    # What a file does not tell is as constructed: the scales follow the heads, the memory holds everything.
    told = inspect.signature(WorldModel).parameters
    assert all(model.config[k] == told[k].default for k in model.config.keys() - config.keys())
    used = {k: t.shape for k, t in tensors.items() if not k.startswith(weights.UNUSED)}
    assert used == {k: t.shape for k, t in own.items()}
    _, written = world_model_weights.to_original(model.config, own)
    assert {k: tuple(t.shape) for k, t in written.items()} == shapes


def test_preset_of_full_size_is_the_release():
    from hydra.utils import instantiate

    from vgr import command

    with torch.device("meta"):
        preset, model = instantiate(command.compose("train", ["model=world_model_2b6"]).model), WorldModel()
    assert preset.config == {**model.config, **world_model_weights.RELEASED}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    tensors = random_release()
    (folder / "dit").mkdir()
    save_file(tensors, folder / "dit" / "sana_wm_1600m_720p.safetensors")
    return SimpleNamespace(folder=folder, file=folder / "dit" / "sana_wm_1600m_720p.safetensors", tensors=tensors)


@pytest.mark.parametrize("sizes", [{}, {"layers": 5, "every": 4, "d": 112, "n": 1, "hidden": 123}], ids=["2", "4"])
def test_output_equals_port_with_the_same_tensors(tmp_path, sizes):
    diffusers = pytest.importorskip("diffusers")
    from benchmarks.speed.sana_port import fp32_softmax, make_inputs

    sizes, tensors = {**NARROW, **sizes}, random_release(3, **sizes)
    save_file(tensors, tmp_path / "file.safetensors")
    # The port's renormalisation is on in both kinds of block, whatever the release wants (spec 4.2).
    ours = WorldModel.from_pretrained(tmp_path / "file.safetensors", cam_renorm_gdn=True, softmax_bf16=False).eval()
    port = diffusers.SanaWMTransformer3DModel(
        in_channels=sizes["c"], num_layers=sizes["layers"], hidden_size=sizes["d"], num_attention_heads=sizes["n"],
        linear_head_dim=sizes["d"] // sizes["n"], softmax_every_n=sizes["every"], caption_channels=sizes["text"],
        mlp_ratio=sizes["hidden"] / sizes["d"] + 1e-9, chunk_plucker_post_attn_blocks=sizes["layers"],
    ).eval()  # fmt: skip
    theirs = {k.replace("mlp.0.", "linear_1.").replace("mlp.2.", "linear_2."): v for k, v in tensors.items()}
    for name in ("pos_embed", "y_embedder.y_embedding"):
        del theirs[name]
    port.load_state_dict(theirs)
    inputs = make_inputs(2, sizes["c"], 5, (3, 4), sizes["text"], sizes["raw"], 1)
    with torch.no_grad(), fp32_softmax():
        expected = port(**inputs.port_arguments(), return_dict=False)[0]
        actual, _ = ours(inputs.x, inputs.t, inputs.cond)
    assert (actual - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


def test_switches_are_the_released_ones_unless_given(release):
    config = WorldModel.from_pretrained(release.folder).config
    assert config["cam_renorm_softmax"] and config["softmax_bf16"] and config["truncate_times"]
    assert config["cam_renorm_gdn"] is False
    other = WorldModel.from_pretrained(release.folder, softmax_bf16=False, activation_checkpointing=True)
    assert other.config == {**config, "softmax_bf16": False} and other.activation_checkpointing
    with pytest.raises(ValueError, match="takes no softmax_fp16"):
        WorldModel.from_pretrained(release.folder, softmax_fp16=True)


def test_every_form_of_the_release_gives_one_model(release, tmp_path):
    expected = WorldModel.from_pretrained(release.file).state_dict()
    streaming = tmp_path / "streaming"
    for part in ("sana_dit", "ltx2_causal_vae"):
        (streaming / part).mkdir(parents=True)
    nested = {"generator": {f"model.{k}": v for k, v in release.tensors.items()}, "step": 3}
    torch.save(nested, streaming / "sana_dit" / "model.pt")
    save_file({"a": torch.zeros(1)}, streaming / "ltx2_causal_vae" / "diffusion_pytorch_model.safetensors")
    wrapped = {k.replace("blocks.1.", "module.blocks.1._fsdp_wrapped_module."): v for k, v in release.tensors.items()}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    for source in (release.folder, streaming, streaming / "sana_dit" / "model.pt", tmp_path / "wrapped.pt"):
        actual = WorldModel.from_pretrained(source).state_dict()
        assert actual.keys() == expected.keys() and all(torch.equal(actual[k], expected[k]) for k in expected), source
    save_file({k: v.bfloat16() for k, v in release.tensors.items()}, tmp_path / "half.safetensors")
    half = WorldModel.from_pretrained(tmp_path / "half.safetensors").state_dict()
    assert all(v.dtype == torch.float32 and torch.equal(v, expected[k].bfloat16().float()) for k, v in half.items())
    torch.save({**release.tensors, "model.pos_embed": torch.zeros(1)}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"twice\.pt: some tensors are there twice"):
        WorldModel.from_pretrained(tmp_path / "twice.pt")


def test_report_counts_what_has_no_effect_and_why(release, caplog):
    with caplog.at_level(logging.INFO):
        WorldModel.from_pretrained(release.file)
    for told in ("1 pos_embed (positions are rotary)", "2 raymap_embedder (", "4 attn.recall_gate (",
                 "2 attn.A_log (softmax blocks have no gates)", "4 attn.beta_proj (", "of the model's"):  # fmt: skip
        assert told in caplog.text


def test_files_that_do_not_fit_are_refused_by_name(release, tmp_path):
    file = tmp_path / "x.safetensors"

    def load(changes, **kwargs):
        save_file({k: v for k, v in {**release.tensors, **changes}.items() if v is not None}, file)
        return WorldModel.from_pretrained(file, **kwargs)

    gone = {"blocks.1.mlp.t_conv.weight": None}
    for changes, told in (
        (gone, r"1 tensors missing \['blocks\.1\.mlp\.temporal\.weight'\]"),
        ({"blocks.0.attn.k_proj_cam.bias": None}, r"missing \['blocks\.0\.attn\.qkv_cam\.bias'\], 2 unknown"),
        ({"blocks.0.attn.lora.weight": torch.zeros(2)}, r"1 unknown \['blocks\.0\.attn\.lora\.weight'\]"),
        ({"t_block.1.bias": torch.zeros(7)}, r"1 of another shape \['t_block\.bias \(7,\) for \(288,\)'\]"),
        ({"blocks.2.attn.conv_k.weight": None}, r"conv_k is missing in blocks \[1, 2, 3\]"),
        ({"x_embedder.proj.weight": None}, r"not a world model's weights, 'x_embedder\.weight' is missing"),
        ({"final_layer.linear.bias": torch.full((4,), torch.nan)}, r"NaN.*\['final_linear\.bias'\]"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            load(changes)
        assert str(file) in str(error.value)
    with pytest.raises(ValueError, match="self-attention has 2 heads, cross-attention 3"):
        world_model_weights.from_diffusers({"num_attention_heads": 3}, release.tensors)
    start = load(gone, partial=True)
    assert not start.blocks[1].mlp.temporal.weight.any()  # a new model's start
    assert torch.equal(start.blocks[0].mlp.temporal.weight, release.tensors["blocks.0.mlp.t_conv.weight"])


def test_missing_weights_are_told_how_to_get():
    with pytest.raises(FileNotFoundError, match=r"SANA-WM_bidirectional.*10\.7 GB, Apache-2\.0"):
        WorldModel.from_pretrained("Efficient-Large-Model/SANA-WM_bidirectional")
