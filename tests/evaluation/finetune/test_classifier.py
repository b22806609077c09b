"""The classifier: where it starts from, layer decay, and the way back from a file."""

import re

import pytest
import torch
from photo_folders import new_classifier

from ibeton.evaluation.finetune.classifier import (
    Classifier,
    classifier_state,
    load_classifier,
)
from ibeton.evaluation.finetune.config import FinetuneConfig, from_values, recipe
from ibeton.evaluation.finetune.steps import build_optimizer, build_schedule
from ibeton.model import ModelConfig
from ibeton.model.backbones.swin import SwinTransformer
from ibeton.model.backbones.vit import VisionTransformer
from ibeton.model.checkpoint import load_backbone, load_checkpoint, save_checkpoint

DECAY = 0.65


def depth_of(name: str, blocks: int) -> int:
    """Layers behind a parameter, counted by hand: the classifier and the final norm have none."""
    if match := re.match(r"backbone\.blocks\.(\d+)\.", name):
        return blocks - int(match[1])
    if name in ("backbone.cls_token", "backbone.pos_embed") or "patch_embed" in name:
        return blocks + 1
    return 0


def rates_by_name(classifier: Classifier, config: FinetuneConfig) -> dict[str, tuple]:
    """(learning rate, weight decay) of every parameter after the warm-up's last step."""
    optimizer = build_optimizer(classifier, config)
    schedule = build_schedule(optimizer, config, per_epoch=10)
    schedule.step_update(10 * config.warmup_epochs)
    names = {id(p): name for name, p in classifier.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def small_vit(depth, **options):
    sizes = {"embed_dim": 16, "num_heads": 2, "patch_size": 8, "image_size": 32}
    return VisionTransformer(ModelConfig(depth=depth, **sizes, **options), is_student=False)


def test_every_parameter_of_a_vit_learns_at_decay_to_the_power_of_its_depth():
    vit = small_vit(5, layer_scale=0.1)
    config = FinetuneConfig(layer_decay=DECAY, batch_size=512)
    rates = rates_by_name(Classifier(vit, 3, hidden=8), config)
    assert len(rates) == len(dict(Classifier(vit, 3, hidden=8).named_parameters()))
    for name, (lr, decay) in rates.items():
        assert lr == pytest.approx(0.5 * config.lr * DECAY ** depth_of(name, 5), rel=1e-9), name
        bare = name.endswith((".bias", "cls_token", "pos_embed", "gamma_1", "gamma_2"))
        assert decay == (0 if bare or "norm" in name else 0.05), name


def test_every_block_of_a_swin_is_a_layer_and_merging_follows_its_stage():
    config = ModelConfig(arch="swin_t7", embed_dim=64, image_size=32)
    swin = SwinTransformer(config, False, (1, 2, 1, 1), (1, 2, 2, 4))
    rates = rates_by_name(Classifier(swin, 3), FinetuneConfig(layer_decay=0.5))
    order = ("patch_embed", "layers.0.blocks.0", "layers.0.downsample", "layers.1.blocks.0",
             "layers.1.blocks.1", "layers.1.downsample", "layers.2.blocks.0",
             "layers.2.downsample", "layers.3.blocks.0")  # fmt: skip
    for behind, part in enumerate(reversed(order), start=1):
        own = [lr for name, (lr, _) in rates.items() if name.startswith(f"backbone.{part}.")]
        assert own
        assert own == pytest.approx([1e-3 * 0.5**behind] * len(own)), part
    assert rates["backbone.norm.weight"][0] == pytest.approx(1e-3)
    assert rates["head.weight"][0] == pytest.approx(1e-3)


def test_without_layer_decay_all_learn_at_one_rate():
    vit = small_vit(2)
    rates = rates_by_name(Classifier(vit, 3), FinetuneConfig(layer_decay=1.0))
    assert {lr for lr, _ in rates.values()} == {1e-3}


def test_the_rate_warms_up_from_its_start_and_falls_to_its_end_on_a_cosine():
    classifier = Classifier(small_vit(1), 3)
    config = FinetuneConfig(layer_decay=1.0, epochs=10, warmup_epochs=2)
    optimizer = build_optimizer(classifier, config)
    schedule = build_schedule(optimizer, config, per_epoch=10)
    rates = []
    for step in range(100):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6)
    assert rates[10] == pytest.approx((1e-3 + 1e-6) / 2)
    assert rates[20] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx((1e-3 + 1e-6) / 2)
    assert 1e-6 < rates[99] < 3e-6


def test_the_rate_of_a_small_batch_never_rises_above_its_peak():
    """The recipes' end, 1e-5, is not scaled with the batch; the peak is."""
    classifier = Classifier(small_vit(1), 3)
    few = {"labels": "0.1", "batch_size": 64, "mix_images": 64, "layer_decay": 1.0, "epochs": 10}
    config = from_values({"checkpoint": "c.pt", "train": "a", "val": "b", **few}, "vit_s")
    schedule = build_schedule(optimizer := build_optimizer(classifier, config), config, 1)
    rates = []
    for step in range(10):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert config.peak_lr() < config.min_lr
    assert max(rates) == pytest.approx(config.peak_lr())


@pytest.mark.parametrize("hidden", [0, 8])
def test_logits_come_from_the_class_token_of_the_whole_network(hidden):
    torch.manual_seed(0)
    vit = small_vit(3)
    classifier = Classifier(vit, 3, hidden=hidden).eval()
    images = torch.randn(4, 3, 32, 32)
    token = vit(images)[:, 0]
    if hidden:
        token = torch.nn.functional.gelu(classifier.neck[0](token))
    torch.testing.assert_close(classifier(images), classifier.head(token))


def test_a_swin_is_judged_by_the_mean_of_its_tokens():
    torch.manual_seed(0)
    swin = SwinTransformer(
        ModelConfig(arch="swin_t7", embed_dim=64, image_size=32), False, (1, 1, 1, 1), (1, 2, 2, 4)
    )
    classifier, images = Classifier(swin, 3).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(classifier(images), classifier.head(swin(images)[:, 1:].mean(1)))


def test_it_starts_from_the_checkpoints_backbone_and_the_heads_first_layer(checkpoint):
    content = load_checkpoint(checkpoint)
    classifier = new_classifier(
        checkpoint, 5, network="student", projection=True, head_init_scale=0.001
    )
    saved = content["student"]
    for name, tensor in classifier.backbone.state_dict().items():
        assert torch.equal(tensor, saved[f"backbone.{name}"]), name
    assert torch.equal(classifier.neck[0].weight, saved["head.mlp.0.weight"])
    assert torch.equal(classifier.neck[0].bias, saved["head.mlp.0.bias"])
    assert "masked_embed" not in dict(classifier.backbone.named_parameters())
    assert 1e-5 < classifier.head.weight.std() < 4e-5
    assert not classifier.head.bias.any()


def test_from_scratch_keeps_the_architecture_alone(checkpoint):
    torch.manual_seed(3)
    fresh = new_classifier(checkpoint, 5, from_scratch=True)
    trained = new_classifier(checkpoint, 5)
    fresh_state, trained_state = fresh.state_dict(), trained.state_dict()
    assert fresh_state.keys() == trained_state.keys()
    name = "backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(fresh_state[name], trained_state[name])


def test_stochastic_depth_rises_to_the_last_block(checkpoint):
    classifier = new_classifier(checkpoint, 5, drop_path=0.4)
    assert classifier.backbone.drop_path_rates == [0.0, 0.4]


def test_a_checkpoint_of_it_gives_back_the_classifier_and_the_backbone(checkpoint, tmp_path):
    torch.manual_seed(0)
    classifier = new_classifier(checkpoint, 3, projection=True).eval()
    content = {
        **classifier_state(classifier),
        **{"config": load_checkpoint(checkpoint)["config"], "classes": ["a", "b", "c"]},
        **{"finetune": {"image_size": 32}, "ema": None},
    }
    save_checkpoint(tmp_path / "tuned.pt", content)
    loaded, classes, settings = load_classifier(tmp_path / "tuned.pt")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), classifier(images))
    assert (classes, settings["image_size"]) == (["a", "b", "c"], 32)
    backbone, _ = load_backbone(tmp_path / "tuned.pt")
    assert torch.equal(backbone(images), classifier.backbone(images))
    with pytest.raises(ValueError, match="without --ema"):
        load_classifier(tmp_path / "tuned.pt", ema=True)
    with pytest.raises(ValueError, match="without a classifier"):
        load_classifier(checkpoint)


def test_recipes_follow_the_architecture_and_the_data_set():
    assert recipe("imagenet", "vit_s", "") == {}
    assert recipe("imagenet", "vit_b", "")["layer_decay"] == 0.65
    assert recipe("transfer", "vit_b", "cars")["lr"] == 7.5e-5
    assert recipe("transfer", "vit_s", "inat18")["lr"] == 5e-5
    assert recipe("transfer", "vit_b", "inat18")["lr"] == 7.5e-6
    assert recipe("transfer", "vit_s", "cifar10")["repeats"] == 3
    assert recipe("semi", "vit_s", "")["ema"] == 0.99996
    assert recipe("semi", "vit_s", "")["repeats"] == 3  # eval_cls.py: repeated_aug


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_transfer_recipe_mixes_by_96_images_as_published(processes):
    given = {"checkpoint": "c.pt", "dataset": "cifar10", "root": "."}
    assert from_values(given, "vit_s").shares(processes) == (768 // processes, 96)


def test_the_recipe_follows_from_the_task():
    sets = {"checkpoint": "c.pt", "train": "a", "val": "b"}
    assert from_values(sets, "vit_s").recipe == "imagenet"
    assert from_values({**sets, "labels": "0.1"}, "vit_s").recipe == "semi"
    assert from_values({**sets, "labels": "0.1", "recipe": "imagenet"}, "vit_s").ema == 0
