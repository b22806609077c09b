"""The cheap scores of a network in training: one forward pass per photo, seconds of arithmetic."""

from pathlib import Path

import torch

from ibeton.evaluation.frozen.cluster import agreement
from ibeton.evaluation.frozen.features import Extraction, extract
from ibeton.evaluation.frozen.knn import classify_features
from ibeton.evaluation.photos import PhotoSet
from ibeton.model.network import Network


def quick_scores(
    network: Network,
    train: str | Path,
    val: str | Path,
    image_size: int = 224,
    k: int = 20,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
) -> dict[str, float]:
    """knn_top1 and knn_top5, and how the head's prototypes agree with the classes of `val`:
    head_acc, head_ari, head_nmi, head_fmi, head_fmi_chance, all in percent, and head_clusters, how
    many it uses.

    network: a student or teacher, on `device` and left as it was. It makes no collective call: in
    a distributed run rank 0 calls it while the others wait. Raises as `PhotoSet`.
    """
    how = Extraction(device, batch_size)
    train_set = PhotoSet(train, image_size)
    val_set = PhotoSet(val, image_size, train_set.classes)
    memory = extract(network.backbone, train_set, ("cls",), how)
    asked = extract(network.backbone, val_set, ("cls", "prototype"), how, network.head)
    top1, top5 = classify_features(memory, asked, [k])[k]
    clusters = agreement(asked.labels.numpy(), asked.arrays["prototype"])
    return {
        "knn_top1": top1,
        "knn_top5": top5,
        **{f"head_{name}": value for name, value in clusters.items()},
    }
