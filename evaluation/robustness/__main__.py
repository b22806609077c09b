"""How robust a classifier is to what it was not trained for: other photos, corruptions, other
backgrounds, missing patches, shuffled pieces.

    ibeton linear --checkpoint C --train imagenet.beton --val val.beton --save-head head.pt
    ibeton robustness --checkpoint C --head head.pt --val val.beton --imagenet-a FOLDER ...
    ibeton robustness --checkpoint runs/finetune/best.pt --val val.beton

The classifier is a frozen backbone with a layer of linear probing, or a fine-tuned one. Any of the
sets may be left out:

    --imagenet-a  FOLDER/<wnid>/  (and -r)  the 200 classes of each are the ones to choose from
    --imagenet-c  FOLDER/<corruption>/<1-5>/<wnid>/  the center crop; mean error, and mCE
    --in9         FOLDER/<variant>/val/00_dog/  with --in9-map: class numbers to IN-9's
    --val         class folders or .beton: occlusion and shuffling, with curves as PNG

Class folders are matched with the classifier's classes by name.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ibeton.command import run_or_exit
from ibeton.distributed import leave_group
from ibeton.evaluation.command import Scores, add_checkpoint_options, extraction_of, settings_of
from ibeton.evaluation.frozen.features import Extraction
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.robustness import accuracy
from ibeton.evaluation.robustness.classifier import Classifier, load_classifier
from ibeton.evaluation.robustness.curves import Saliency, curve_scores, draw_curves, measure
from ibeton.evaluation.tasks import finish, one_process
from ibeton.model.checkpoint import load_backbone
from ibeton.model.config import SWINS
from ibeton.options import Parser

SETS = ("imagenet_a", "imagenet_r", "imagenet_c", "in9", "val")
HEADLINES = ("top1", "mean_error", "mce", "original", "clean")


def make_parser() -> Parser:
    parser = Parser(prog="ibeton robustness", description="Robustness of a classifier.")
    add_checkpoint_options(parser)
    add = parser.add_argument
    add("--head", type=Path, help="linear layer that `ibeton linear --save-head` wrote")
    add("--batch-size", type=int, default=128, help="images per forward pass (default: 128)")
    add("--imagenet-a", type=Path, help="folder of ImageNet-A")
    add("--imagenet-r", type=Path, help="folder of ImageNet-R")
    add("--imagenet-c", type=Path, help="folder of ImageNet-C: CORRUPTION/1-5/CLASS")
    add("--in9", type=Path, help="folder of the backgrounds challenge: VARIANT/val/00_dog")
    add("--in9-map", type=Path, help="in_to_in9.json of the backgrounds challenge")
    add("--val", type=Path, help="labeled photos to occlude and shuffle: folder, tar or .beton")
    add(
        "--saliency-weights",
        type=Path,
        help="checkpoint whose attention decides which patches are salient",
    )
    add("--saliency-head", type=int, help="attention head, from 0 (default: the mean of all)")
    add("--seed", type=int, default=0, help="seed of dropped patches and shuffled pieces")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The report. All layouts are checked before the first photo is classified. Raises ValueError
    or OSError with a sentence for the user."""
    if not any(getattr(args, name) for name in SETS):
        raise ValueError("give at least one of --imagenet-a, -r, -c, --in9 and --val")
    if bool(args.in9) != bool(args.in9_map):
        raise ValueError("--in9 and --in9-map go together")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be at least 0")
    how = extraction_of(args)
    one_process("robustness")
    judged = load_classifier(args.checkpoint, args.head, args.network)
    model = judged.model.to(how.device)
    known = (judged.size, judged.classes)
    left_out: dict[str, str] = {}
    variants = {
        f"imagenet_{name}": accuracy.read_variant(name, path, *known, judged.view)
        for name in ("a", "r")
        if (path := getattr(args, f"imagenet_{name}"))
    }
    corruptions = accuracy.read_corruptions(args.imagenet_c, *known) if args.imagenet_c else {}
    backgrounds = accuracy.read_backgrounds(args.in9, judged.size) if args.in9 else {}
    mapped = accuracy.read_in9_map(args.in9_map, judged.num_classes) if args.in9 else None
    photos = PhotoSet(args.val, *known, judged.view) if args.val else None
    saliency = _saliency(judged, args, how, left_out) if args.val else None

    scores: dict[str, Scores] = {}
    for key, (own, candidates) in variants.items():
        say(f"{key}: {len(own)} photos, {len(candidates)} classes")
        scores[key] = {"top1": accuracy.top1(model, own, how, key, candidates)}
    if corruptions:
        scores["imagenet_c"] = _corruption_scores(model, corruptions, how)
        if "mce" not in scores["imagenet_c"]:
            left_out["mce"] = f"{args.imagenet_c} lacks some of the 15 standard corruptions"
    accuracies = {}
    for name, own in backgrounds.items():
        say(f"in9: {name}, {len(own)} photos")
        accuracies[name] = accuracy.top1(model, own, how, f"in9 {name}", mapped=mapped)
    if accuracies:
        scores["in9"] = accuracy.background_scores(accuracies)
    if photos is not None:
        say(f"occlusion and shuffling: {len(photos)} photos")
        patch = judged.config["patch_size"]
        scores |= curve_scores(measure(model, saliency, photos, patch, how, args.seed))
    settings = ("head", *SETS, "saliency_weights", "saliency_head", "seed")
    report = settings_of(args, judged.config, settings)
    report |= {"image_size": judged.size, "classes": judged.num_classes}
    return {**report, "left_out": left_out, "scores": {args.network: scores}}


def _corruption_scores(
    model: nn.Module, sets: dict[str, dict[str, PhotoSet]], how: Extraction
) -> Scores:
    errors: dict[str, list[float]] = {}
    for name, levels in sets.items():
        for level, photos in levels.items():
            say(f"imagenet_c: {name} {level}, {len(photos)} photos")
            right = accuracy.top1(model, photos, how, f"{name} {level}")
            errors.setdefault(name, []).append(100 - right)
    return accuracy.corruption_scores(errors)


def _saliency(
    classifier: Classifier, args: argparse.Namespace, how: Extraction, left_out: dict[str, str]
) -> Saliency | None:
    """Whose attention says what is salient: the classifier's own backbone, or another one."""
    backbone: Any = classifier.model.backbone
    config = classifier.config
    if args.saliency_weights:
        other, config = load_backbone(args.saliency_weights)
        backbone = other.to(how.device)
    if config["arch"] in SWINS:
        if args.saliency_weights:
            raise ValueError(f"--saliency-weights {args.saliency_weights} is a Swin; give a ViT")
        left_out["salient occlusion"] = "a Swin has no class token; give --saliency-weights"
        return None
    if classifier.size % config["patch_size"]:
        raise ValueError(
            f"--saliency-weights {args.saliency_weights} has patches of {config['patch_size']}"
            f" pixels, which do not tile views of {classifier.size}"
        )
    heads = backbone.blocks[-1].attn.num_heads
    if args.saliency_head is not None and not 0 <= args.saliency_head < heads:
        raise ValueError(f"--saliency-head {args.saliency_head}: there are heads 0 to {heads - 1}")
    return Saliency(backbone, args.saliency_head)


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The whole command: 0 when done, exit status 2 with one sentence for bad input."""
    args = make_parser().parse_args(argv)

    def act() -> None:
        report = run(args)
        path = finish(report, "robustness", args.json, HEADLINES)
        if args.val:
            picture = path.with_suffix(".png")
            title = f"{Path(*args.checkpoint.absolute().parts[-2:])}, {Path(args.val).name}"
            draw_curves(report["scores"][args.network], picture, title)
            print(picture)

    try:
        return run_or_exit(act)
    finally:
        leave_group()


if __name__ == "__main__":
    raise SystemExit(main())
