"""Published figures of iBOT by architecture, to stand beside measured ones.

Source: iBOT (arXiv 2111.07832, tables 2, 4, 6 - 8, 11 - 14, 16 and appendices) for ViT-S/16 and
ViT-B/16 pre-trained on ImageNet-1K, read from the paper; k-NN and linear probing of ViT-B/16 are
from the README of bytedance/ibot (commit 030ffe4).
"""

# (protocol, score) in our JSON -> what it is called, and its value by architecture. One that is not
# there was not published.
FIGURES: dict[tuple[str, str], tuple[str, dict[str, float]]] = {
    ("knn", "best_top1"): ("k-NN, top-1", {"vit_s": 75.2, "vit_b": 77.1}),
    ("linear", "top1"): ("linear probing, top-1", {"vit_s": 77.9, "vit_b": 79.5}),
    ("finetune", "top1"): ("fine-tuning, top-1", {"vit_s": 82.3, "vit_b": 84.0, "vit_l": 84.8}),
    ("semi_0.01", "top1"): ("fine-tuning on 1 % of the labels, top-1", {"vit_s": 61.9}),
    ("semi_0.1", "top1"): ("fine-tuning on 10 % of the labels, top-1", {"vit_s": 75.1}),
    ("transfer_cifar10", "top1"): ("transfer to CIFAR-10, top-1", {"vit_s": 99.1, "vit_b": 99.2}),
    ("transfer_cifar100", "top1"): ("transfer to CIFAR-100, top-1", {"vit_s": 90.7, "vit_b": 92.2}),
    ("transfer_inat18", "top1"): (
        "transfer to iNaturalist 2018, top-1",
        {"vit_s": 73.7, "vit_b": 74.6},
    ),
    ("transfer_inat19", "top1"): (
        "transfer to iNaturalist 2019, top-1",
        {"vit_s": 78.5, "vit_b": 79.6},
    ),
    ("transfer_flowers", "top1"): ("transfer to Flowers, top-1", {"vit_s": 98.6, "vit_b": 98.9}),
    ("transfer_cars", "top1"): ("transfer to Cars, top-1", {"vit_s": 94.0, "vit_b": 94.3}),
    ("davis", "jf_mean"): ("DAVIS-2017, J&F", {"vit_s": 61.8}),
    ("davis", "j_mean"): ("DAVIS-2017, J", {"vit_s": 60.4}),
    ("davis", "f_mean"): ("DAVIS-2017, F", {"vit_s": 63.2}),
    ("roxford5k", "medium_map"): ("revisited Oxford, medium, mAP", {"vit_s": 36.6}),
    ("roxford5k", "hard_map"): ("revisited Oxford, hard, mAP", {"vit_s": 13.0}),
    ("rparis6k", "medium_map"): ("revisited Paris, medium, mAP", {"vit_s": 61.5}),
    ("rparis6k", "hard_map"): ("revisited Paris, hard, mAP", {"vit_s": 34.1}),
    ("imagenet_a", "top1"): ("ImageNet-A, top-1", {"vit_s": 13.8}),
    ("imagenet_c", "mean_error"): ("ImageNet-C, mean error", {"vit_s": 48.1}),
    ("segment", "miou"): (
        "segmentation with UperNet, mIoU (published: ADE20K)",
        {"vit_s": 45.4, "vit_b": 50.0},
    ),
    ("segment", "macc"): (
        "segmentation with UperNet, mAcc (published: ADE20K)",
        {"vit_s": 56.2, "vit_b": 60.3},
    ),
    ("segment_linear", "miou"): (
        "segmentation with a linear head, mIoU (published: ADE20K)",
        {"vit_b": 38.3},
    ),
    ("segment_linear", "macc"): (
        "segmentation with a linear head, mAcc (published: ADE20K)",
        {"vit_b": 48.0},
    ),
    ("detect", "box_ap"): ("detection, box AP (published: COCO)", {"vit_s": 49.4, "vit_b": 51.2}),
    ("detect", "box_ap50"): (
        "detection, box AP50 (published: COCO)",
        {"vit_s": 68.7, "vit_b": 70.8},
    ),
    ("detect", "box_ap75"): (
        "detection, box AP75 (published: COCO)",
        {"vit_s": 53.3, "vit_b": 55.5},
    ),
    ("detect", "mask_ap"): ("detection, mask AP (published: COCO)", {"vit_s": 42.6, "vit_b": 44.2}),
    ("detect", "mask_ap50"): (
        "detection, mask AP50 (published: COCO)",
        {"vit_s": 65.6, "vit_b": 67.8},
    ),
    ("detect", "mask_ap75"): (
        "detection, mask AP75 (published: COCO)",
        {"vit_s": 45.8, "vit_b": 47.7},
    ),
    ("in9", "original"): ("backgrounds: original, top-1", {"vit_s": 96.8}),
    ("in9", "only_fg"): ("backgrounds: only foreground, top-1", {"vit_s": 90.9}),
    ("in9", "mixed_same"): ("backgrounds: mixed same, top-1", {"vit_s": 89.7}),
    ("in9", "mixed_rand"): ("backgrounds: mixed random, top-1", {"vit_s": 81.7}),
    ("in9", "mixed_next"): ("backgrounds: mixed next, top-1", {"vit_s": 80.3}),
    ("in9", "no_fg"): ("backgrounds: no foreground, top-1", {"vit_s": 53.5}),
    ("in9", "only_bg_b"): ("backgrounds: only background, black box, top-1", {"vit_s": 22.7}),
    ("in9", "only_bg_t"): ("backgrounds: only background, tiled, top-1", {"vit_s": 17.4}),
}


def published(protocol: str, score: str, arch: str) -> str:
    """The figure to stand beside `score` of `protocol`: a number, "not published" for this
    architecture, or empty where no figure of this kind is on record."""
    if (protocol, score) not in FIGURES:
        return ""
    values = FIGURES[protocol, score][1]
    return f"{values[arch]:.1f}" if arch in values else "not published"
