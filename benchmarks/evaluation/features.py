"""Does feature extraction run as fast as the slower of its two halves, decoding and the network?

    python benchmarks/evaluation/features.py --data photos.beton --arch vit_s
    python benchmarks/evaluation/features.py --embed-dim 96 --depth 4 --num-heads 3

In rounds that take turns: views decoded by `--workers` threads and thrown away; the network on
views in memory, by `--threads` threads of a CPU or on a GPU; and both together, as all frozen
evaluations run them. On a CPU give each half the cores that it has in the whole: one and one of
two. The aim is 0.9 of the slower half. On a machine that others use too the whole may not get the
cores that both halves need; CPU time tells what it would cost on one of its own: both halves' over
the whole's says what putting them together adds.
"""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch

from ibeton.benchmarks.harness import measure as harness
from ibeton.benchmarks.harness.measure import quartiles, spread
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.command import run_or_exit
from ibeton.evaluation.frozen.features import Extraction, feature_batches, normalized, tokens_of
from ibeton.evaluation.photos import PhotoSet, view_batches
from ibeton.model.config import ModelConfig
from ibeton.model.ibot import build_network
from ibeton.options import add_options, fill
from ibeton.progress import plain_console
from ibeton.training.config import PRECISIONS

NAMES = ("blocks", "cls", "parts", "patch_mean", "prototype")  # what evaluation.all asks for
LOADER, FORWARD, WHOLE = "decoding alone", "network alone", "extraction"


def measure(
    data: str, config: ModelConfig, how: Extraction, images: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Images/s of the halves and of the whole, and CPU milliseconds per image, by round."""
    photos = PhotoSet(data, config.image_size)
    network = build_network(config, is_student=False).eval().to(how.device)
    order = np.arange(images) % len(photos)
    pinned = torch.device(how.device).type == "cuda"
    ready = list(view_batches(photos, order[: 2 * how.batch_size], how.batch_size, pinned=pinned))

    def decode() -> int:
        batches = view_batches(photos, order, how.batch_size, how.threads, pinned=pinned)
        return sum(len(batch.indices) for batch in batches)

    def forward() -> int:
        done = 0
        for batch in itertools.cycle(ready):
            with torch.inference_mode(), how.autocast():
                views = normalized(batch.images, how.device)
                found = tokens_of(network.backbone, network.head, views, NAMES)
            done += len(batch.images)
            if done >= images:
                break
        found["cls"].cpu()  # waits for the device
        return done

    def whole() -> int:
        batches = feature_batches(network.backbone, photos, NAMES, order, how, network.head)
        return sum(len(indices) for indices, _ in batches)

    return harness.on_two_clocks({LOADER: decode, FORWARD: forward, WHOLE: whole}, rounds)


def shares(rates: dict[str, list[float]]) -> list[float]:
    """Round by round, the whole over its slower half."""
    halves = zip(rates[LOADER], rates[FORWARD], strict=True)
    return [whole / min(pair) for whole, pair in zip(rates[WHOLE], halves, strict=True)]


def without_waiting(cpu: dict[str, list[float]]) -> list[float]:
    """Round by round, the CPU time of both halves over that of the whole: 1 if nothing is added."""
    of = (cpu[name] for name in (LOADER, FORWARD, WHOLE))
    return [(loader + forward) / whole for loader, forward, whole in zip(*of, strict=True)]


def main() -> None:
    parser, count = harness.make_parser(__doc__), harness.integer(1)
    parser.add_argument("--data", help=".beton, folder or tar (default: photos drawn for it)")
    parser.add_argument("--images", type=count, default=256, help="images per round")
    parser.add_argument("--batch-size", type=count, default=32, help="images at a time")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode")
    parser.add_argument("--threads", type=int, default=1, help="other threads, on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    add_options(parser, ModelConfig)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = fill(ModelConfig, vars(args))
    how = Extraction(args.device, args.batch_size, args.workers, args.precision)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or synthetic_beton(Path(folder))
        rates, cpu = measure(data, config, how, args.images, args.rounds)
    about, console = harness.machine("torch", "pillow"), plain_console(width=100)
    title = f"images/s, {config.arch} at {config.image_size} pixels, {args.device}"
    table = harness.figures("", "images/s", "CPU ms per image", title=title)
    for name, values in rates.items():
        table.add_row(name, spread(values), spread(cpu[name]))
    table.add_row("extraction over the slower half", spread(shares(rates), 2))
    table.add_row("both halves over extraction", "", spread(without_waiting(cpu), 2))
    console.print(table)
    console.print(f"{args.workers} decoding threads, {args.threads} of the network")
    middle = {"share_of_slower": quartiles(shares(rates))[0]}
    middle["share_of_cpu"] = quartiles(without_waiting(cpu))[0]
    found = {"images_per_s": rates, "cpu_ms": cpu}
    harness.conclude(console, about, args.rounds, args.json, **found, **middle)


if __name__ == "__main__":
    run_or_exit(main)
