"""Published figures of iBOT by architecture, to stand beside measured ones.

Source: iBOT (arXiv 2111.07832, tables 2, 4, 6 - 8, 11 - 14, 16 and appendices) for ViT-S/16 and
ViT-B/16 pre-trained on ImageNet-1K, read from the paper; k-NN and linear probing of ViT-B/16 are
from memory of the public model table.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A published figure: under which names our JSON holds the same, and its value by
    architecture. One that is not there was not published."""

    task: str
    protocol: str
    score: str
    values: dict[str, float]


def _of(task: str, protocol: str, score: str, vit_s: float | None, vit_b: float | None) -> Figure:
    values = {"vit_s": vit_s, "vit_b": vit_b}
    known = {arch: value for arch, value in values.items() if value is not None}
    return Figure(task, protocol, score, known)


FIGURES = (
    _of("k-NN, top-1", "knn", "best_top1", 75.2, 77.1),
    _of("linear probing, top-1", "linear", "top1", 77.9, 79.5),
    Figure("fine-tuning, top-1", "finetune", "top1", {"vit_s": 82.3, "vit_b": 84.0, "vit_l": 84.8}),
    _of("fine-tuning on 1 % of the labels, top-1", "semi_0.01", "top1", 61.9, None),
    _of("fine-tuning on 10 % of the labels, top-1", "semi_0.1", "top1", 75.1, None),
    _of("transfer to CIFAR-10, top-1", "transfer_cifar10", "top1", 99.1, 99.2),
    _of("transfer to CIFAR-100, top-1", "transfer_cifar100", "top1", 90.7, 92.2),
    _of("transfer to iNaturalist 2018, top-1", "transfer_inat18", "top1", 73.7, 74.6),
    _of("transfer to iNaturalist 2019, top-1", "transfer_inat19", "top1", 78.5, 79.6),
    _of("transfer to Flowers, top-1", "transfer_flowers", "top1", 98.6, 98.9),
    _of("transfer to Cars, top-1", "transfer_cars", "top1", 94.0, 94.3),
    _of("DAVIS-2017, J&F", "davis", "jf_mean", 61.8, None),
    _of("DAVIS-2017, J", "davis", "j_mean", 60.4, None),
    _of("DAVIS-2017, F", "davis", "f_mean", 63.2, None),
    _of("revisited Oxford, medium, mAP", "roxford5k", "medium_map", 36.6, None),
    _of("revisited Oxford, hard, mAP", "roxford5k", "hard_map", 13.0, None),
    _of("revisited Paris, medium, mAP", "rparis6k", "medium_map", 61.5, None),
    _of("revisited Paris, hard, mAP", "rparis6k", "hard_map", 34.1, None),
    _of("ImageNet-A, top-1", "imagenet_a", "top1", 13.8, None),
    _of("ImageNet-C, mean error", "imagenet_c", "mean_error", 48.1, None),
    _of("ADE20K with UperNet, mIoU", "segment", "miou", 45.4, 50.0),
    _of("ADE20K with UperNet, mAcc", "segment", "macc", 56.2, 60.3),
    _of("ADE20K with a linear head, mIoU", "segment_linear", "miou", None, 38.3),
    _of("ADE20K with a linear head, mAcc", "segment_linear", "macc", None, 48.0),
    _of("COCO, box AP", "detect", "box_ap", 49.4, 51.2),
    _of("COCO, box AP50", "detect", "box_ap50", 68.7, 70.8),
    _of("COCO, box AP75", "detect", "box_ap75", 53.3, 55.5),
    _of("COCO, mask AP", "detect", "mask_ap", 42.6, 44.2),
    _of("COCO, mask AP50", "detect", "mask_ap50", 65.6, 67.8),
    _of("COCO, mask AP75", "detect", "mask_ap75", 45.8, 47.7),
    _of("backgrounds: original, top-1", "in9", "original", 96.8, None),
    _of("backgrounds: only foreground, top-1", "in9", "only_fg", 90.9, None),
    _of("backgrounds: mixed same, top-1", "in9", "mixed_same", 89.7, None),
    _of("backgrounds: mixed random, top-1", "in9", "mixed_rand", 81.7, None),
    _of("backgrounds: mixed next, top-1", "in9", "mixed_next", 80.3, None),
    _of("backgrounds: no foreground, top-1", "in9", "no_fg", 53.5, None),
    _of("backgrounds: only background, black box, top-1", "in9", "only_bg_b", 22.7, None),
    _of("backgrounds: only background, tiled, top-1", "in9", "only_bg_t", 17.4, None),
)


def published(protocol: str, score: str, arch: str) -> str:
    """The figure to stand beside `score` of `protocol`: a number, "not published" for this
    architecture, or empty where no figure of this kind is on record."""
    for figure in FIGURES:
        if (figure.protocol, figure.score) == (protocol, score):
            value = figure.values.get(arch)
            return "not published" if value is None else f"{value:.1f}"
    return ""


def task_of(protocol: str, score: str) -> str:
    """What a published figure is called; empty for other scores."""
    for figure in FIGURES:
        if (figure.protocol, figure.score) == (protocol, score):
            return figure.task
    return ""
