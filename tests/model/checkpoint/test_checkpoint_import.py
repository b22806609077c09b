"""Checkpoints of iBOT, DINO and timm, made to the published lists of names and shapes."""

import argparse
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import REFERENCE

from ibeton.model import ModelConfig, build, load_backbone
from ibeton.model.checkpoint import (
    load_checkpoint,
    load_weights_into,
    model_state,
    read_foreign,
    save_checkpoint,
)
from ibeton.model.checkpoint.__main__ import main
from ibeton.model.checkpoint.export_ibot import export_ibot, export_ibot_backbone
from ibeton.model.checkpoint.export_timm import export_timm

INVENTORY = json.loads((REFERENCE / "checkpoint_inventory.json").read_text())
ARCHITECTURES = {
    "vit_small_16": "vit_s",
    "vit_base_16": "vit_b",
    "vit_large_16": "vit_l",
    "swin_tiny_w7": "swin_t7",
    "swin_tiny_w14": "swin_t14",
}
LEFT = ["optimizer", "epoch", "args", "fp16_scaler"]


def filled(shapes):
    """A tensor for each name, each of a value of its own, that takes no room on the disk. Class
    token and patches share the last layer, as in the published runs."""
    state = {}
    for number, (name, shape) in enumerate(shapes.items()):
        dtype = torch.int64 if name.endswith("relative_position_index") else torch.float32
        twin = state.get(name.replace("last_layer2", "last_layer"))
        state[name] = torch.full((), number, dtype=dtype).expand(shape) if twin is None else twin
    return state


def published(entry):
    arguments = argparse.Namespace(arch=entry["arch"], norm_last_layer=entry["norm_last_layer"])
    parts = {name: filled(entry[name]) for name in ("student", "teacher", "ibot_loss")}
    return {
        **parts,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 7,
        "args": arguments,
        "fp16_scaler": {"scale": 2.0**16},
    }


def backbone_of(entry):
    prefix = "backbone."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in filled(entry["teacher"]).items()
        if name.startswith(prefix)
    }


def backbone_in(foreign):
    assert set(foreign.content) == {"teacher", "config"}
    return {k.removeprefix("backbone."): v for k, v in foreign.content["teacher"].items()}


def write(path, content):
    torch.save(content, path)
    return path


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "large" in name else ())
        for name in ARCHITECTURES
    ],
)
def test_a_full_checkpoint_comes_back_as_it_was(name, tmp_path):
    entry = INVENTORY[name]
    content = published(entry)
    foreign = read_foreign(write(tmp_path / "theirs.pth", content))
    config = foreign.content["config"]
    assert foreign.layout == "iBOT checkpoint"
    assert foreign.unused == LEFT
    assert config["arch"] == ARCHITECTURES[name]
    assert config["norm_last_layer"] == entry["norm_last_layer"]
    assert (config["image_size"], config["out_dim"], config["shared_head"]) == (224, 8192, True)
    save_checkpoint(tmp_path / "ours.pt", foreign.content)
    assert_same(load_checkpoint(tmp_path / "ours.pt")["teacher"], content["teacher"])
    export_ibot(tmp_path / "ours.pt", tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=False)
    for part in ("student", "teacher", "ibot_loss"):
        assert_same(again[part], content[part])
    assert again["args"].arch == entry["arch"]


@pytest.mark.parametrize("name", ["vit_small_16", "swin_tiny_w7", "swin_tiny_w14"])
def test_a_backbone_alone_comes_back_as_it_was(name, tmp_path):
    state = backbone_of(INVENTORY[name])
    path = write(tmp_path / "theirs.pth", {"state_dict": state})
    save_checkpoint(tmp_path / "ours.pt", read_foreign(path).content)
    backbone, config = load_backbone(tmp_path / "ours.pt")
    assert config["arch"] == ARCHITECTURES[name]
    assert not backbone.training
    assert_same(backbone.state_dict(), state)
    export_ibot_backbone(tmp_path / "ours.pt", tmp_path / "again.pth")
    assert_same(torch.load(tmp_path / "again.pth")["state_dict"], state)
    with pytest.raises(ValueError, match="export it with --to ibot-backbone"):
        export_ibot(tmp_path / "ours.pt", tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"--network student: .* one backbone alone"):
        load_backbone(tmp_path / "ours.pt", "student")


def test_the_large_backbone_is_known_by_its_shapes(tmp_path):
    state = backbone_of(INVENTORY["vit_large_16"])
    foreign = read_foreign(write(tmp_path / "theirs.pth", {"state_dict": state}))
    assert foreign.content["config"]["arch"] == "vit_l"
    assert_same(backbone_in(foreign), state)


def test_a_students_backbone_keeps_its_mask_token(tmp_path):
    student = filled(INVENTORY["vit_small_16"]["student"])
    state = {name: tensor for name, tensor in student.items() if ".backbone." in name}
    save_checkpoint(
        tmp_path / "ours.pt",
        read_foreign(write(tmp_path / "theirs.pth", {"state_dict": state})).content,
    )
    backbone, _ = load_backbone(tmp_path / "ours.pt")
    assert torch.equal(backbone.masked_embed, student["module.backbone.masked_embed"])


@pytest.mark.parametrize("patch", [16, 8])
def test_backbones_of_dino(patch, tmp_path):
    state = backbone_of(INVENTORY["vit_small_16"])
    state["patch_embed.proj.weight"] = torch.zeros(384, 3, patch, patch)
    state["pos_embed"] = torch.zeros(1, 1 + (224 // patch) ** 2, 384)
    foreign = read_foreign(write(tmp_path / "dino_deitsmall_pretrain.pth", state))
    assert foreign.layout == "backbone"
    assert foreign.unused == []
    assert foreign.content["config"]["patch_size"] == patch
    assert_same(backbone_in(foreign), state)


def test_full_checkpoints_of_dino_give_the_backbone_and_name_the_head(tmp_path):
    head = {"head.mlp.0.weight": torch.zeros(8, 384), "head.last_layer.weight_v": torch.zeros(4, 8)}
    teacher = {f"backbone.{k}": v for k, v in backbone_of(INVENTORY["vit_small_16"]).items()} | head
    student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
    content = {
        "student": student,
        "teacher": teacher,
        "optimizer": {},
        "epoch": 1,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    path = write(tmp_path / "checkpoint.pth", content)
    for network, plus, behind in (("teacher", 0, ""), ("student", 1, "module.")):
        foreign = read_foreign(path, network)
        assert foreign.layout == f"DINO checkpoint, names behind '{behind}backbone.'"
        expected = {k: v + plus for k, v in backbone_of(INVENTORY["vit_small_16"]).items()}
        assert_same(backbone_in(foreign), expected)
        heads = {behind + name for name in head}
        assert set(foreign.unused) == heads | (set(content) - {network})


VICTIMS = [
    ("vit_small_16", "student", "module.", "backbone.pos_embed"),
    ("vit_small_16", "teacher", "", "head.last_layer.weight_v"),
    ("vit_base_16", "student", "module.", "backbone.masked_embed"),
    ("vit_large_16", "teacher", "", "backbone.blocks.23.attn.qkv.weight"),
    ("swin_tiny_w7", "teacher", "", "backbone.layers.3.blocks.1.mlp.fc2.bias"),
    ("swin_tiny_w14", "student", "module.", "backbone.layers.0.downsample.reduction.weight"),
    (
        "swin_tiny_w14",
        "teacher",
        "",
        "backbone.layers.1.blocks.1.attn.relative_position_bias_table",
    ),
]


@pytest.mark.parametrize(("name", "network", "prefix", "victim"), VICTIMS)
def test_a_missing_or_misshaped_tensor_is_refused_by_name(name, network, prefix, victim, tmp_path):
    content = published(INVENTORY[name])
    tensor = content[network].pop(prefix + victim)
    with pytest.raises(ValueError, match=rf"{network} of .*missing: {victim}$"):
        read_foreign(write(tmp_path / "theirs.pth", content))
    content[network][prefix + victim] = longer(tensor)
    with pytest.raises(ValueError, match=rf"{network} of .*of another shape: {victim} \["):
        read_foreign(write(tmp_path / "theirs.pth", content))


def longer(tensor):
    return torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)


def without_repetition(names):
    """The first block stands for the others."""
    return [name for name in names if ".blocks." not in f".{name}" or "blocks.0." in name]


@pytest.mark.slow
def test_every_tensor_of_a_network_is_missed_by_its_own_name(tmp_path):
    saved(tmp_path / "ours.pt", small())
    export_ibot(tmp_path / "ours.pt", tmp_path / "whole.pth")
    content = torch.load(tmp_path / "whole.pth", weights_only=False)
    for number, name in enumerate(without_repetition(content["teacher"])):
        part, key = ("teacher", name) if number % 2 else ("student", f"module.{name}")
        state = content[part]
        others = {k: v for k, v in state.items() if k != key}
        for wrong, said in ((others, "missing"), (state | {key: longer(state[key])}, "shape")):
            path = write(tmp_path / "theirs.pth", content | {part: wrong})
            with pytest.raises(
                ValueError, match=rf"{part} of .*{said}: {name}( \[[^a-z]*\(|$)"
            ) as e:
                read_foreign(path)
            assert str(e.value).count(";") == 1, "more was named than this tensor"


def test_every_tensor_of_a_backbone_alone_is_missed_by_its_own_name(tmp_path):
    saved(tmp_path / "ours.pt", small())
    state = load_backbone(tmp_path / "ours.pt")[0].state_dict()
    for name in without_repetition(state):
        others = {k: v for k, v in state.items() if k != name}
        for wrong, said in ((others, "missing"), (others | {name: longer(state[name])}, "shape")):
            path = write(tmp_path / "theirs.pth", {"state_dict": wrong})
            with pytest.raises(ValueError, match=rf"{said}: {name}( \[[^a-z]*\(|$)") as e:
                read_foreign(path, num_heads=4)
            assert str(e.value).count(";") == 1, "more was named than this tensor"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_extra_tensor_is_refused_by_name(name, tmp_path):
    extra = {"backbone.reg_token": torch.zeros(1, 4, 384)}
    content = published(INVENTORY[name])
    content["teacher"] |= extra
    with pytest.raises(ValueError, match=r"teacher .*unknown: backbone.reg_token"):
        read_foreign(write(tmp_path / "theirs.pth", content))
    state = backbone_of(INVENTORY[name]) | extra
    with pytest.raises(ValueError, match=r"unknown: backbone\.reg_token"):
        read_foreign(write(tmp_path / "theirs.pth", {"state_dict": state}))


def test_a_wrong_center_is_refused_by_name(tmp_path):
    content = published(INVENTORY["vit_small_16"])
    content["ibot_loss"]["center2"] = torch.zeros(1, 8192)
    with pytest.raises(ValueError, match=r"ibot_loss .*another shape: center2"):
        read_foreign(write(tmp_path / "theirs.pth", content))
    del content["student"]
    with pytest.raises(ValueError, match="has no student: it holds teacher"):
        read_foreign(write(tmp_path / "theirs.pth", content))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"it holds a posix\.mkdir") as refused:
        read_foreign(write(tmp_path / "theirs.pth", {"teacher": Harmful()}))
    assert "weights_only" not in str(refused.value), "torch's advice is to run the code"
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds a list"),
        ({"weights": 3}, "its weights holds no tensors"),
        ({"speed": 3}, "holds no tensors, and none of state_dict, .* but speed"),
        ({"layer1.conv.weight": torch.zeros(3)}, "holds no ViT or Swin"),
        ({"state_dict": {}}, "state_dict holds no tensors"),
    ],
)
def test_what_is_no_backbone_is_refused(content, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_foreign(write(tmp_path / "theirs.pth", content))


WIDE = {"embed_dim": 192, "depth": 1, "num_heads": 3, "image_size": 32, "patch_size": 8}


def tiny_backbone():
    torch.manual_seed(0)
    return build(ModelConfig(**WIDE, **HEAD)).teacher.backbone.state_dict()


def behind(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


MAE = {"mask_token": torch.zeros(1, 1, 192), "decoder_blocks.0.attn.qkv.bias": torch.zeros(4)}
PROJECTOR = {"projector.0.weight": torch.zeros(4, 192), "classifier.weight": torch.zeros(3, 192)}
LIGHTLY = "_embedding_model.wrapped_model._model."
WRAPPED = {
    "deit": lambda s: ({"model": s | {"head.weight": torch.zeros(3, 192)}}, {"head.weight"}),
    "mae": lambda s: (
        {"model": s | MAE, "epoch": 3, "optimizer": {}},
        {*MAE, "epoch", "optimizer"},
    ),
    "solo-learn": lambda s: (
        {"state_dict": behind("backbone.", s) | PROJECTOR, "epoch": 1},
        {*PROJECTOR, "epoch"},
    ),
    "lightly-train": lambda s: (
        {
            "state_dict": behind(f"teacher{LIGHTLY}", s)
            | behind(f"student{LIGHTLY}", {name: tensor + 1 for name, tensor in s.items()})
        },
        set(behind(f"student{LIGHTLY}", s)),
    ),
    "averaged": lambda s: (behind("module.", s) | {"n_averaged": torch.tensor(7)}, {"n_averaged"}),
    "compiled": lambda s: ({"model": behind("_orig_mod.", s)}, set()),
    "nested": lambda s: ({"model": {"state_dict": behind("encoder.", s), "step": 3}}, {"step"}),
    "numpy numbers": lambda s: ({"model": s, "best": np.float64(3.0)}, {"best"}),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_and_prefixes_are_looked_through_and_what_is_left_out_is_named(kind, tmp_path):
    state = tiny_backbone()
    content, left_out = WRAPPED[kind](state)
    foreign = read_foreign(write(tmp_path / "theirs.pth", content), num_heads=3)
    assert_same(backbone_in(foreign), state)
    assert set(foreign.unused) == left_out


def test_several_backbones_are_told_apart_by_network_or_refused(tmp_path):
    state = tiny_backbone()
    online = {name: tensor + 1 for name, tensor in state.items()}
    content = {"state_dict": behind("backbone.", online) | behind("momentum_backbone.", state)}
    path = write(tmp_path / "byol.ckpt", content)
    assert_same(backbone_in(read_foreign(path, "teacher", 3)), state)
    assert_same(backbone_in(read_foreign(path, "student", 3)), online)
    write(path, behind("left.", state) | behind("right.", online))
    with pytest.raises(ValueError, match=r"several backbones, behind 'left\.', 'right\.'"):
        read_foreign(path, num_heads=3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n<!DOCTYPE html><html><title>404</title>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b"", "it is empty"),
        (b"not a checkpoint at all", "no checkpoint, or a damaged one$"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights_are_called_what_they_are(content, said, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    expected = "no safetensors file" if "damaged" in said and suffix == ".safetensors" else said
    with pytest.raises(ValueError, match=expected) as refused:
        read_foreign(path)
    assert "weights_only" not in str(refused.value)


def test_photos_are_no_checkpoint(tmp_path):
    (tmp_path / "photos.beton").write_bytes(b"photos")
    with pytest.raises(ValueError, match=r"photos\.beton is a \.beton file of photos"):
        read_foreign(tmp_path / "photos.beton")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    state = tiny_backbone()
    state["blocks.0.mlp.fc1.bias"] = torch.full_like(state["blocks.0.mlp.fc1.bias"], torch.nan)
    path = write(tmp_path / "theirs.pth", state)
    with pytest.raises(ValueError, match=r"not finite: teacher\.backbone\.blocks\.0\.mlp"):
        read_foreign(path, num_heads=3)


@pytest.mark.parametrize(("width", "depth"), [(128, 18), (96, 18), (128, 6)])
def test_another_swin_is_told_what_can_be_read(width, depth, tmp_path):
    state = backbone_of(INVENTORY["swin_tiny_w7"])
    last = {k: v for k, v in state.items() if k.startswith("layers.2.blocks.5.")}
    for i in range(6, depth):
        state |= {k.replace("blocks.5.", f"blocks.{i}."): v for k, v in last.items()}
    if width != 96:
        state = {
            name: torch.zeros(tensor.shape[0] * width // 96)
            if re.fullmatch(r"layers.*norm[12]\.weight", name)
            else tensor
            for name, tensor in state.items()
        }
    with pytest.raises(ValueError, match=rf"a Swin of width {width} .*read is Swin-T"):
        read_foreign(write(tmp_path / "swin.pth", state))


@pytest.mark.parametrize("export", [export_timm, export_ibot_backbone])
def test_a_re_imported_backbone_keeps_its_architecture(export, tmp_path):
    saved(tmp_path / "ours.pt", small(arch="vit_t"), arch="vit_t")
    path = tmp_path / ("theirs.safetensors" if export is export_timm else "theirs.pth")
    export(tmp_path / "ours.pt", path)
    assert read_foreign(path, num_heads=4).content["config"]["arch"] == "vit_t"


SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 4, "image_size": 32, "patch_size": 8}
HEAD = {"out_dim": 12, "hidden_dim": 20, "bottleneck_dim": 6}


def small(seed=0, **others):
    torch.manual_seed(seed)
    return build(ModelConfig(**{**SMALL, **HEAD, **others}))


def saved(path, ibot, **others):
    config = ModelConfig(**{**SMALL, **HEAD, **others})
    save_checkpoint(path, model_state(ibot) | {"config": asdict(config)})
    return path


@pytest.mark.parametrize("norm", ["none", "ln", "bn"])
@pytest.mark.parametrize("shared", [True, False])
def test_heads_of_every_kind_are_known_by_their_shapes(norm, shared, tmp_path):
    kind = {"norm_in_head": norm, "shared_head": shared, "patch_out_dim": 12 if shared else 10}
    kind |= {"shared_head_teacher": shared, "head_layers": 4, "mean_pool": shared}
    ours = saved(tmp_path / "ours.pt", small(**kind), **kind)
    export_ibot(ours, tmp_path / "theirs.pth")
    config = read_foreign(tmp_path / "theirs.pth").content["config"]
    assert {name: config[name] for name in kind} == kind
    assert config["num_heads"] == 4


def test_a_vit_of_odd_size_needs_its_number_of_heads(tmp_path, capsys):
    saved(tmp_path / "ours.pt", small())
    export_ibot_backbone(tmp_path / "ours.pt", tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"width 48 and 3 blocks.*--num-heads"):
        read_foreign(tmp_path / "theirs.pth")
    arguments = ["import", tmp_path / "theirs.pth", tmp_path / "back.pt", "--num-heads", 4]
    main([str(a) for a in arguments])
    assert "42 tensors kept" in capsys.readouterr().out
    images = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        ours, back = (load_backbone(tmp_path / f"{name}.pt")[0] for name in ("ours", "back"))
        assert torch.equal(ours(images), back(images))


def test_the_command_says_what_it_did_and_refuses_to_write_over(tmp_path, capsys):
    saved(tmp_path / "ours.pt", small())
    main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "theirs.pth"), "--to", "ibot"])
    main(["import", str(tmp_path / "theirs.pth"), str(tmp_path / "back.pt")])
    assert "none missing, unused: epoch, args" in capsys.readouterr().out
    main(["inspect", str(tmp_path / "back.pt")])
    said = capsys.readouterr().out
    for part in ("teacher backbone", "student head", "ibot_loss", "num_heads"):
        assert part in said
    main(["inspect", str(tmp_path / "theirs.pth")])
    assert "iBOT checkpoint" in capsys.readouterr().out
    before = (tmp_path / "back.pt").read_bytes()
    for words, reason in (
        (["import", tmp_path / "theirs.pth", tmp_path / "back.pt"], "back.pt exists"),
        (["import", tmp_path / "back.pt", tmp_path / "new.pt"], "ibeton already"),
        (["import", tmp_path / "nowhere.pth", tmp_path / "new.pt"], "does not exist"),
        (["export", tmp_path / "theirs.pth", tmp_path / "x", "--to", "ibot"], "by ibeton import"),
        (["inspect", tmp_path / "nowhere.safetensors"], "does not exist"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert reason in error
        assert len(error.strip().splitlines()) == 1
    assert (tmp_path / "back.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.pt", "ours.pt", "theirs.pth"]


def weights(kind, tmp_path):
    """A file of that kind, and the teacher that it was made from."""
    source = small(seed=1)
    ours = saved(tmp_path / "ours.pt", source)
    if kind == "ours":
        return ours, source
    if kind == "timm":
        export_timm(ours, tmp_path / "theirs.safetensors")
        return tmp_path / "theirs.safetensors", source
    export_ibot(ours, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth", source


@pytest.mark.parametrize("kind", ["ours", "timm", "ibot"])
def test_a_run_starts_from_the_weights_of_others(kind, tmp_path):
    path, source = weights(kind, tmp_path)
    ibot = small(seed=2)
    head = {name: tensor.clone() for name, tensor in ibot.student.head.state_dict().items()}
    fresh = load_weights_into(ibot, path)
    assert fresh == (["masked_embed"] if kind == "timm" else [])
    for network in (ibot.student, ibot.teacher):
        for name, tensor in source.teacher.backbone.state_dict().items():
            assert torch.equal(network.backbone.state_dict()[name], tensor), name
    assert_same(ibot.student.head.state_dict(), head)


def test_weights_of_another_architecture_are_refused_and_nothing_is_loaded(tmp_path):
    path, _ = weights("ours", tmp_path)
    ibot = small(seed=2, image_size=48)
    before = {name: tensor.clone() for name, tensor in ibot.state_dict().items()}
    with pytest.raises(ValueError, match=r"another shape: pos_embed \[1, 17, 48\]"):
        load_weights_into(ibot, path)
    assert_same(ibot.state_dict(), before)
