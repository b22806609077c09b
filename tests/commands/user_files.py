"""What a user may have lying about: good files of every kind, and bad ones."""

import json
import pickle
import shutil
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ibeton.__main__ import main as ibeton
from ibeton.model import ModelConfig, build
from ibeton.model.checkpoint import model_state, save_checkpoint
from ibeton.pipeline.convert.converter import ConvertOptions, convert

SIZES = {"arch": "vit_t", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
SIZES |= {"image_size": 32, "out_dim": 16, "patch_out_dim": 16, "hidden_dim": 16}
SIZES |= {"bottleneck_dim": 8}


def write_user_files(root: Path) -> None:
    """Everything that commands read, below `root`."""
    write_photos(root / "photos", 8)
    write_photos(root / "val", 3)
    write_photos(root / "one class", 6, ("only",))
    (root / "fotos ä [final]").mkdir()
    shutil.copyfile(root / "photos" / "light" / "1.jpg", root / "fotos ä [final]" / "é.jpg")
    with tarfile.open(root / "photos.tar", "w") as tar:
        tar.add(root / "photos", "photos")
    convert(root / "photos", root / "photos.beton", ConvertOptions(workers=1))
    for i in (1, 2):
        shard = ConvertOptions(workers=1, shard=f"{i}/2")
        convert(root / "photos", root / f"shard{i}.beton", shard)
    write_photos(root / "many", 48)
    convert(root / "many", root / "many.beton", ConvertOptions(workers=1))
    write_checkpoints(root)
    write_run(root / "runs" / "one")
    write_run(root / "runs" / "two")
    stages = {"loader_ms": {"decode": {"ms": [1.0, 2.0]}}, "step_ms": {"loss": [1.0, 2.0]}}
    throughput = {"images_per_s": {"both": [1.0, 2.0]}, **stages}
    (root / "throughput.json").write_text(json.dumps(throughput))
    write_scenes(root / "ade")
    write_coco(root / "coco")
    write_video(root / "DAVIS")
    write_landmarks(root / "roxford5k")
    write_copies(root / "copydays")
    write_corrupted(root / "c")
    write_bad(root)


def write_photos(folder: Path, each: int, classes: tuple[str, ...] = ("dark", "light")) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            photo(each * number + i, 100 * (number % 2)).save(folder / name / f"{i}.jpg")


def photo(seed: int, ground: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 100, (4, 5, 3), dtype=np.uint8) + ground
    return Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def write_checkpoints(root: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(**SIZES)  # type: ignore[arg-type]
    content = model_state(build(config)) | {"config": asdict(config)}
    save_checkpoint(root / "checkpoint.pt", content)
    torch.save({"state_dict": content["teacher"]}, root / "foreign.pth")
    sets = ("--train", root / "photos", "--val", root / "val", "--epochs", "1", "--device", "cpu")
    written = ("--json", root / "linear.json", "--save-head", root / "linear.pt")
    words = ("linear", "--checkpoint", root / "checkpoint.pt", *sets, *written)
    assert ibeton([str(word) for word in words]) == 0
    spoiled = {name: tensor * float("nan") for name, tensor in content["teacher"].items()}
    save_checkpoint(root / "nan.pt", content | {"teacher": spoiled})


def write_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    settings = {"arch": "vit_t", "epochs": 3, "lr": 1e-3 * len(folder.name)}
    (folder / "config.json").write_text(json.dumps(settings))
    starts = [{"steps_per_epoch": 4, "step": 0, "processes": 1}]
    (folder / "run.json").write_text(json.dumps({"state": "finished", "starts": starts}))
    losses = {"epoch": 0, "loss": 5.0, "cls": 2.0, "patch": 3.0}
    steps = [{"step": i, **losses} for i in range(4)]
    (folder / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    scores = {"scores": {"teacher": {"knn": {"top1_k20": 70.0}}}, "checkpoint": "checkpoint.pt"}
    (folder / "checkpoint.knn.json").write_text(json.dumps({**scores, "arch": "vit_t"}))
    shutil.copyfile(folder.parents[1] / "checkpoint.pt", folder / "checkpoint.pt")


def write_scenes(root: Path) -> None:
    for part, count in (("training", 4), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for i in range(count):
            photo(i).save(root / "images" / part / f"{i}.jpg")
            labels = np.ones((40, 48), np.uint8)
            labels[10:20, 10:20] = 2
            Image.fromarray(labels).save(root / "annotations" / part / f"{i}.png")
    (root / "classes.json").write_text(json.dumps(["ground", "square"]))


def write_coco(root: Path) -> None:
    (root / "annotations").mkdir(parents=True)
    box = {"bbox": [5, 5, 20, 20], "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]], "area": 400}
    images, objects = [], []
    for i in range(2):
        name = f"{i:012d}.jpg"
        for part in ("train2017", "val2017"):
            (root / part).mkdir(exist_ok=True)
            photo(i).save(root / part / name)
        images.append({"id": i, "file_name": name, "height": 40, "width": 48})
        objects.append({"id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0, **box})
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "box"}]}
    for part in ("train2017", "val2017"):
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def write_video(root: Path) -> None:
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("car\n")
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p" / "car").mkdir(parents=True)
    for i in range(3):
        photo(i, size=(72, 64)).save(root / "JPEGImages" / "480p" / "car" / f"{i:05d}.jpg")
        mask = np.zeros((64, 72), np.uint8)
        mask[8:24, 8 + 4 * i : 24 + 4 * i] = 1
        Image.fromarray(mask).save(root / "Annotations" / "480p" / "car" / f"{i:05d}.png")


def write_landmarks(root: Path) -> None:
    (root / "jpg").mkdir(parents=True)
    for i in range(4):
        photo(i, size=(80, 64)).save(root / "jpg" / f"scene_{i}.jpg")
    shots = {"easy": np.array([1]), "hard": np.array([2]), "junk": np.array([3])}
    content = {"imlist": [f"scene_{i}" for i in range(4)], "qimlist": ["scene_0"]}
    content["gnd"] = [{**shots, "bbx": [0, 0, 60, 60]}]  # type: ignore[dict-item]
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content, protocol=2))


def write_copies(root: Path) -> None:
    for folder in ("original", "strong", "jpegqual/3", "crops/10"):
        (root / folder).mkdir(parents=True)
    for i in range(4):
        photo(i).save(root / "original" / f"2{i:03d}00.jpg")
        photo(i).save(root / "jpegqual" / "3" / f"2{i:03d}00.jpg", quality=3)
        photo(i).save(root / "crops" / "10" / f"2{i:03d}00.jpg")
        photo(i).rotate(5).save(root / "strong" / f"2{i:03d}01.jpg")


def write_corrupted(root: Path) -> None:
    for severity in "12345":
        write_photos(root / "fog" / severity, 1)


def write_bad(root: Path) -> None:
    """Files that are not what their names say."""
    for name in ("photos.beton", "checkpoint.pt", "photos.tar"):
        content = (root / name).read_bytes()
        (root / f"cut-{name}").write_bytes(content[: len(content) // 2])
        (root / f"empty-{name}").write_bytes(b"")
        (root / f"page-{name}").write_text("<!DOCTYPE html><html><body>404</body></html>\n" * 9)
    (root / "list.json").write_text("[1, 2")
    (root / "null.json").write_text("null")
    (root / "empty").mkdir()
    (root / "no photos").mkdir()
    (root / "no photos" / "photo.jpg").write_bytes(b"no photo")
    (root / "loop").symlink_to(root / "loop")
    (root / "dangling.pt").symlink_to(root / "gone.pt")
    (root / "around").mkdir()
    (root / "around" / "again").symlink_to(root / "around")
