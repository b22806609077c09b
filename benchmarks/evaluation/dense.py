"""Dense tasks: memory and predicted hours of the published runs, and on a GPU what is measured.

python benchmarks/evaluation/dense.py              # by fake tensors: no GPU
python benchmarks/evaluation/dense.py --measure    # steps on a GPU, two minutes
python benchmarks/evaluation/dense.py --measure --checkpoint C --data camvid    # and mIoU, six
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ibeton.benchmarks.harness.budget_rates import DEVICES
from ibeton.benchmarks.harness.measure import counting_kept, in_words, integer, machine
from ibeton.benchmarks.harness.model_step import now
from ibeton.command import run_or_exit
from ibeton.evaluation.dense.detector import Detector
from ibeton.evaluation.dense.segmenter import Segmenter
from ibeton.evaluation.segment import main as segment
from ibeton.model.config import ARCHITECTURES, SWINS, ModelConfig
from ibeton.model.ibot import build_backbone
from ibeton.progress import plain_console

ADE_CLASSES, COCO_CLASSES = 150, 80
GPUS = ("h100", "v100")
CROP, SIDES = 512, (800, 1333)  # pixels of a crop of ADE20K, of COCO's largest view
ROIS, OBJECTS = 512, 8  # regions per image and stage, objects of a drawn image
RUN_IMAGES = {"segment": 160_000 * 16, "detect": 12 * 117_266}  # of the published runs
# Share of the rate of a large product that a whole step reaches, from slow to fast: a pre-training
# step in PyTorch's operations reached 0.16 on an H100. A dense task's share is to be measured.
SHARES = (0.1, 0.25)


def build(task: str, arch: str, drop_path: float = 0.1) -> nn.Module:
    """The published model, without weights of any training."""
    backbone = build_backbone(ModelConfig(arch=arch, drop_path=drop_path), is_student=True)
    backbone.masked_embed = None
    if task == "segment":
        return Segmenter(backbone, ADE_CLASSES, "upernet")
    return Detector(backbone, COCO_CLASSES)


def drawn(task: str, images: int, device: str = "cpu") -> Any:
    """A batch of the published size."""
    if task == "segment":
        photos = torch.randn(images, 3, CROP, CROP, device=device)
        return photos, torch.randint(ADE_CLASSES, (images, CROP, CROP), device=device)
    height, width = (-(-side // 32) * 32 for side in SIDES)
    corner = torch.rand(OBJECTS, 2) * torch.tensor([width / 2, height / 2])
    boxes = torch.cat([corner, corner + 60 + 300 * torch.rand(OBJECTS, 2)], dim=1)
    truth = {"boxes": boxes, "labels": torch.arange(OBJECTS) + 1}
    truth["masks"] = torch.ones(OBJECTS, height, width, dtype=torch.uint8)
    photos = torch.randn(images, 3, height, width, device=device)
    return photos, [SIDES] * images, [{name: t.to(device) for name, t in truth.items()}] * images


def loss_without_matching(model: Detector, batch: Any) -> Tensor:
    """A sum over all heads at ROIS regions per image: what depends on boxes has no fake tensors."""
    maps = model.fpn({str(i): m for i, m in enumerate(model.pyramid(batch[0]))})
    logits, deltas = model.rpn.head(list(maps.values()))
    terms = [*logits, *deltas]
    count = ROIS * len(batch[0])
    for stage in model.cascade.stages:
        pooled = maps["0"].mean((0, 2, 3)).view(1, -1, 1, 1)
        features = stage.box_head(pooled.expand(count, -1, 7, 7).clone())
        terms += stage.box_predictor(features)
        terms.append(stage.masks(pooled.expand(count // 4, -1, 14, 14).clone()))  # objects
    return torch.stack([term.float().mean() for term in terms]).sum()


def counted(task: str, arch: str, images: int) -> dict[str, float]:
    """Of a whole step: millions of weights, GiB of weights, gradients and moments in float32, GiB
    that the forward keeps for the backward in half precision, and TFLOP of all matrix products."""
    with FakeTensorMode():
        model = build(task, arch, drop_path=0.0).train()  # what is dropped has no fake tensors
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        batch = drawn(task, images)
        hooks, flops = counting_kept(weights=False), FlopCounterMode(display=False)
        with flops, hooks as kept, torch.autocast("cpu", torch.bfloat16):
            if task == "segment":
                loss = model(batch, list(range(images)))["loss"]
            else:
                loss = loss_without_matching(model, batch)  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
        weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "weights M": weights / 1e6,
        "fixed GiB": 16 * weights / 2**30,
        "kept GiB": kept() / 2**30,
        "TFLOP": 3 * flops.get_total_flops() / 1e12,  # the backward takes twice the forward
    }


def predicted(task: str, found: dict[str, float], images: int) -> dict[str, str]:
    """GPU hours of the published run without its evaluation, from fast to slow, by device."""
    work = 1e12 * found["TFLOP"] / images * RUN_IMAGES[task] / 3600
    hours = {gpu: [work / DEVICES[gpu].matrix / share for share in SHARES] for gpu in GPUS}
    return {f"{gpu} hours": f"{fast:.0f} - {slow:.0f}" for gpu, (slow, fast) in hours.items()}


def measured(task: str, arch: str, images: int, steps: int = 10) -> dict[str, float]:
    """Images/s and peak GiB of published steps in fp16 on the GPU."""
    model = build(task, arch).cuda().train()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-5), torch.amp.GradScaler()
    batch = drawn(task, images, "cuda")
    torch.cuda.reset_peak_memory_stats()
    for step in range(steps + 3):
        if step == 3:
            begun = now("cuda")
        with torch.autocast("cuda", torch.float16):
            loss = model(batch, list(range(images)))["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    rate = images * steps / (now("cuda") - begun)
    return {"images_per_s": rate, "peak": torch.cuda.max_memory_allocated() / 2**30}


def learned(checkpoint: str, data: str, steps: int) -> dict[str, float]:
    """mIoU of UperNet on the pre-trained and on the untrained backbone at equal budget."""
    found = {}
    for name, option in {"pre-trained": "--no-untrained", "untrained": "--untrained"}.items():
        with tempfile.TemporaryDirectory() as folder:
            out = ["--checkpoint", checkpoint, "--data", data, "--output-dir", folder]
            sizes = f"--steps {steps} --crop-size 256 --short-side 256 --warmup-steps {steps // 10}"
            rest = f"--lr 1e-4 --layer-decay 0.9 --pictures 0 --workers 8 {option}"
            if segment([*out, *f"{sizes} {rest}".split()]):
                raise RuntimeError(f"the run of the {name} backbone failed")
            found[name] = json.loads((Path(folder) / "scores.json").read_text())["scores"]["miou"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--measure", action="store_true", help="run steps on a GPU")
    archs = (*ARCHITECTURES, *SWINS)
    parser.add_argument("--archs", nargs="+", choices=archs, default=["vit_s", "vit_b"])
    parser.add_argument("--images", type=int, default=2, help="images per GPU")
    parser.add_argument("--checkpoint", help="of a backbone, to compare with an untrained one")
    parser.add_argument("--data", help="folder for evaluation.segment")
    parser.add_argument(
        "--steps", type=integer(1), default=1000, help="of each run of the comparison"
    )
    args = parser.parse_args()
    if args.measure and not torch.cuda.is_available():
        parser.error("--measure: no CUDA device is usable here")
    if (args.checkpoint is None) != (args.data is None):
        parser.error("--checkpoint and --data go together: give both or neither")
    if args.images < 2:
        parser.error(f"--images {args.images}: UperNet normalizes over the batch; give at least 2")
    console, images = plain_console(width=100), args.images
    rows: dict[str, dict[str, Any]] = {}
    for task, arch in itertools.product(("segment", "detect"), args.archs):
        if args.measure:
            rows[f"{task} {arch}"] = measured(task, arch, images)
        else:
            found = counted(task, arch, images)
            rows[f"{task} {arch}"] = {**found, **predicted(task, found, images)}
    title = f"a step of {images} images, {'measured' if args.measure else 'counted'}"
    table = Table("", *next(iter(rows.values())), title=title)
    for name, values in rows.items():
        table.add_row(name, *(v if isinstance(v, str) else f"{v:.2f}" for v in values.values()))
    console.print(table)
    if args.checkpoint:
        console.print(learned(args.checkpoint, args.data, args.steps))
    console.print(in_words(machine("torch", "torchvision", "transformers")))


if __name__ == "__main__":
    run_or_exit(main)
