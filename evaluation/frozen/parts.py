"""Part-wise linear probing: how well do a photo's most attended patches predict its class?

The last block's patch tokens are ranked by the attention that the class token pays them (mean of
the heads); the mean of the first k = 1, 7, 14, 56, 112, 196 goes into a linear layer (iBOT, section
4.3). As in the published code, patch tokens are taken before the final norm. Beside them: the mean
of all patches, and the class token. The linear layers are those of `evaluation.frozen.linear`, on
evaluation views.
"""

from typing import Any

from torch import Tensor

from ibeton.evaluation.command import Protocol, Scores, Task
from ibeton.evaluation.frozen import linear
from ibeton.evaluation.frozen.features import PARTS, Features
from ibeton.evaluation.frozen.heads import train_heads
from ibeton.model.config import SWINS


def needs(config: dict[str, Any]) -> tuple[str, ...]:
    if config["arch"] in SWINS:
        raise ValueError(
            f"part-wise probing of {config['arch']}: a Swin has no class token whose attention"
            " would rank patches; give a ViT"
        )
    return ("parts", "cls")


def part_scores(task: Task) -> Scores:
    """Top-1 in percent of linear probing on the mean of the k most attended patches, for each k up
    to the number of patches, on that of all and on the class token."""
    patches = (task.train_photos.size // task.config["patch_size"]) ** 2

    def inputs(features: Features) -> dict[str, Tensor]:
        *parts, whole = features["parts"].unbind(dim=1)
        means = {f"k{k}_top1": x for k, x in zip(PARTS, parts, strict=True) if k <= patches}
        return {**means, "all_top1": whole, "cls_top1": features["cls"]}

    settings, val, scores = linear.settings_of(task.args), inputs(task.val), {}
    for name, features in inputs(task.train).items():
        batches = linear.shuffled(features, task.train.labels, settings)
        sets = (batches, val[name], task.val.labels, task.num_classes)
        scores[name] = float(train_heads(*sets, settings, task.how.device)[1].max())
    return scores


PROTOCOL = Protocol(
    "parts",
    "Part-wise linear probing.",
    needs,
    part_scores,
    ("k1_top1", "all_top1"),
    (linear.add_options,),
    (linear.settings_of,),
)
main = PROTOCOL.main

if __name__ == "__main__":
    raise SystemExit(main())
