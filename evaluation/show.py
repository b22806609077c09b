"""Pictures of what a backbone learned, one PNG per call:

ibeton show KIND --checkpoint CHECKPOINT --data FOLDER_OR_BETON --output PICTURE.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ibeton.command import run_or_exit
from ibeton.distributed import checked_device, make_current
from ibeton.evaluation.frozen.features import Extraction, feature_batches
from ibeton.evaluation.networks import load_with_head, untrained, view_size
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.pictures.attention import draw_attention
from ibeton.evaluation.pictures.canvas import spread
from ibeton.evaluation.pictures.correspondence import draw_correspondence, two_photos, two_views
from ibeton.evaluation.pictures.learned import draw_learned
from ibeton.evaluation.pictures.neighbors import draw_neighbors
from ibeton.evaluation.pictures.patterns import assign, central_patterns, draw_patterns
from ibeton.model.checkpoint import backbone_of, load_checkpoint
from ibeton.options import Parser, check_output_file


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m evaluation.show", description="Pictures of what a backbone learned."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=Parser)
    attention = kinds.add_parser("attention", help="where the class token looks")
    patterns = kinds.add_parser("patterns", help="the patches most central to a prototype")
    matches = kinds.add_parser("correspondence", help="patches that find each other")
    neighbors = kinds.add_parser(
        "neighbors", aliases=["neighbours"], help="the photos nearest to a photo"
    )
    learned = kinds.add_parser("learned", help="nearest photos before and after training")
    for kind in (attention, patterns, matches, neighbors, learned):
        add = kind.add_argument
        add("--checkpoint", required=True, help="of a run, or an imported one")
        add("--data", required=True, help="labeled photos: folder, tar or .beton")
        add("--output", required=True, type=Path, help="PNG file to write")
        add("--overwrite", action="store_true", help="replace an existing --output")
        add(
            "--network",
            choices=("teacher", "student"),
            default="teacher",
            help="(default: teacher)",
        )
        add("--image-size", type=int, help="side of a view in pixels (default: the model's)")
        add("--device", default="auto", help="cuda, cuda:N, cpu or auto")
    for kind in (attention, matches, neighbors, learned):
        kind.add_argument(
            "--photos", type=int, nargs="+", help="numbers of the photos (default: four)"
        )
    matches.add_argument(
        "--pairs", action="store_true", help="match the photos two by two, not two views of each"
    )
    patterns.add_argument("--patterns", type=int, default=6, help="prototypes to show (default: 6)")
    for kind, count in ((neighbors, 8), (learned, 4)):
        kind.add_argument(
            "--neighbors",
            "--neighbours",
            type=int,
            default=count,
            help=f"neighbors of each photo (default: {count})",
        )
    return parser


def run(args: argparse.Namespace) -> None:
    """Draw what the command line asks for."""
    if args.output.is_file() and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; --overwrite replaces it")
    check_output_file("--output", args.output, ".png", begins=b"")
    device = checked_device(args.device)
    make_current(device)
    args.device = str(device)
    for name in ("patterns", "neighbors"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give at least 1")
    content = load_checkpoint(args.checkpoint)
    if args.kind == "patterns":
        show_patterns(args, content)
        return
    backbone, config = backbone_of(content, args.checkpoint, args.network)
    backbone.to(args.device)
    photos = PhotoSet(args.data, view_size(args.image_size, config))
    indices = args.photos or spread(photos, 4)
    if args.kind == "attention":
        draw_attention(backbone, photos, indices, args.device, args.output)
    elif args.kind in ("neighbors", "neighbours"):
        how = Extraction(args.device)
        draw_neighbors(backbone, photos, indices, args.neighbors, how, args.output)
    elif args.kind == "learned":
        before = untrained(config)[0].to(args.device)
        shown = (indices, args.neighbors, Extraction(args.device), args.output)
        draw_learned(before, backbone, photos, *shown)
    else:
        if args.pairs and len(indices) % 2:
            raise ValueError(f"--pairs with {len(indices)} photos: give two for each row")
        if args.pairs:
            couples = zip(indices[::2], indices[1::2], strict=True)
            pairs = [two_photos(photos, first, second) for first, second in couples]
        else:
            pairs = [two_views(photos, index) for index in indices]
        draw_correspondence(backbone, pairs, config["patch_size"], args.device, args.output)


def show_patterns(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """The patterns of the network's own head."""
    backbone, head, config = load_with_head(args.checkpoint, args.network, content)
    photos = PhotoSet(args.data, view_size(args.image_size, config))
    if head is None:
        raise ValueError(
            f"{args.checkpoint} holds a backbone without a head, and patterns are the head's"
            " prototypes: give a whole checkpoint"
        )
    backbone.to(args.device)
    head.to(args.device)
    center = content["ibot_loss"]["center2"].flatten()
    every = range(len(photos))
    batches = feature_batches(backbone, photos, ("patches",), every, Extraction(args.device))
    assigned = assign(batches, head, center, args.device)
    patterns = central_patterns(assigned, args.patterns)
    draw_patterns(photos, patterns, photos.size // config["patch_size"], args.output)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    run_or_exit(lambda: run(args))
    print(args.output)


if __name__ == "__main__":
    main()
