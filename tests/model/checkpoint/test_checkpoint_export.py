"""What other libraries compute from our exports, beside what our backbone computes."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from ibeton.model import ModelConfig, build, load_backbone
from ibeton.model.checkpoint import model_state, read_foreign, save_checkpoint
from ibeton.model.checkpoint.__main__ import main
from ibeton.model.checkpoint.export_timm import export_timm

HEAD = {"out_dim": 8, "hidden_dim": 8, "bottleneck_dim": 4}
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 4}
VARIANTS = {
    "plain": {},
    "no qkv bias": {"qkv_bias": False, "mlp_ratio": 2.0},
    "layer scale": {"layer_scale": 0.5, "patch_size": 32},
    "mean pooling": {"mean_pool": True},
}


def saved(path: Path, **settings) -> Path:
    """A checkpoint whose every tensor is drawn, so that none can be taken for another."""
    torch.manual_seed(0)
    config = ModelConfig(**{**HEAD, **settings})
    ibot = build(config)
    with torch.no_grad():
        for parameter in ibot.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    save_checkpoint(path, model_state(ibot) | {"config": asdict(config)})
    return path


def images(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))


def timm_tokens(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tokens = model.forward_features(x)
    patches = tokens.flatten(1, 2) if tokens.dim() == 4 else tokens[:, 1:]
    return torch.cat([model(x)[:, None], patches], dim=1)


def loaded_by(call: str) -> nn.Module:
    """The model of the call that the export told us to use."""
    names = {"timm": timm, "partial": partial, "nn": nn}
    if call.startswith("transformers"):
        names["transformers"] = pytest.importorskip("transformers")
    return eval(call, names).eval()


@torch.no_grad()
def test_timms_vit_gives_our_features_at_224_and_at_another_size(tmp_path, assert_near):
    ours = saved(tmp_path / "ours.pt", **SMALL)
    backbone, _ = load_backbone(ours)
    for size in (224, 256, 96):
        target = tmp_path / f"{size}.safetensors"
        model = loaded_by(export_timm(ours, target, image_size=size))
        assert_near(timm_tokens(model, images(size)), backbone(images(size)))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_vit_is_said_in_timms_words(variant, tmp_path, assert_near):
    ours = saved(tmp_path / "ours.pt", **SMALL, **VARIANTS[variant])
    backbone, _ = load_backbone(ours)
    model = loaded_by(export_timm(ours, tmp_path / "theirs.safetensors", image_size=64))
    assert_near(timm_tokens(model, images(64)), backbone(images(64)))


@torch.no_grad()
def test_the_published_vit_needs_its_name_and_nothing_else(tmp_path, assert_near):
    ours = saved(tmp_path / "ours.pt", arch="vit_s")
    call = export_timm(ours, tmp_path / "vit.safetensors", network="student")
    path = str(tmp_path / "vit.safetensors")
    name = "vit_small_patch16_224"
    assert call == f"timm.create_model({name!r}, num_classes=0, checkpoint_path={path!r})"
    backbone, _ = load_backbone(ours, "student")
    for options in ({}, {"dynamic_img_size": True}):
        model = timm.create_model(name, num_classes=0, checkpoint_path=path, **options).eval()
        assert_near(timm_tokens(model, images(224)), backbone(images(224)))
    # timm resizes the position table in its own way, which is why an export is for one size.
    theirs, expected = timm_tokens(model, images(256)), backbone(images(256))
    assert (theirs - expected).abs().max() > 1e-3 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("arch", ["swin_t7", pytest.param("swin_t14", marks=pytest.mark.slow)])
def test_timms_swin_gives_our_features_where_windows_tile(arch, tmp_path, assert_near):
    ours = saved(tmp_path / "ours.pt", arch=arch, patch_size=32, embed_dim=192)
    backbone, _ = load_backbone(ours)
    for size in (224, 448):
        target = tmp_path / f"{size}.safetensors"
        model = loaded_by(export_timm(ours, target, image_size=size))
        assert_near(timm_tokens(model, images(size)), backbone(images(size)))
    back = read_foreign(tmp_path / "224.safetensors")
    assert back.unused == []
    assert back.content["config"]["arch"] == arch
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(back.content["teacher"][f"backbone.{name}"], tensor), name


def test_what_gives_other_features_is_refused_and_not_written(tmp_path, capsys):
    ours = saved(tmp_path / "ours.pt", arch="swin_t7", patch_size=32, embed_dim=192)
    target = tmp_path / "theirs.safetensors"
    with pytest.raises(SystemExit) as stopped:
        main(f"export {ours} {target} --to timm --image-size 96".split())
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "gives other features at 96 pixels" in said
    assert len(said.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("theirs.pt --to timm", "ends in .safetensors"),
        ("theirs.safetensors --to timm --image-size -16", "--image-size -16"),
        (
            "theirs.safetensors --to timm --image-size 100",
            "is not a multiple of the patch",
        ),
        ("no/theirs.safetensors --to timm", "no is no folder"),
        ("ours.pt --to huggingface", "exists"),
        ("theirs.pth --to ibot --image-size 64", "has every size"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "ours.pt", **SMALL)
    with pytest.raises(SystemExit) as stopped:
        main(["export", "ours.pt", *words.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pt"]


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "no qkv bias"])
def test_transformers_vit_gives_our_features(variant, tmp_path, assert_near, capsys):
    pytest.importorskip("transformers", reason="transformers (optional) is not installed")
    ours = saved(tmp_path / "ours.pt", **SMALL, **VARIANTS[variant])
    backbone, _ = load_backbone(ours)
    for size in (224, 256):
        main(f"export {ours} {tmp_path / str(size)} --to huggingface --image-size {size}".split())
        model = loaded_by(capsys.readouterr().out.splitlines()[-1].strip())
        assert_near(model(images(size)).last_hidden_state, backbone(images(size)))


def test_transformers_has_no_swin_of_ours(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers (optional) is not installed")
    ours = saved(tmp_path / "ours.pt", arch="swin_t7", patch_size=32, embed_dim=192)
    with pytest.raises(SystemExit):
        main(f"export {ours} {tmp_path / 'folder'} --to huggingface".split())
    assert "export it with --to timm" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
