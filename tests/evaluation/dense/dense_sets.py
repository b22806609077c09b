"""Small sets of both dense tasks, drawn: colored rectangles on a dark ground."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {1: (200, 60, 60), 2: (60, 200, 60), 3: (60, 60, 220)}  # class -> color
SIZES = ((48, 64), (64, 48), (56, 56))  # height, width


def rectangles(seed: int) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """A photo uint8 [H, W, 3] and its (class, (left, top, right, bottom)), which do not overlap."""
    rng = np.random.default_rng(seed)
    height, width = SIZES[seed % len(SIZES)]
    photo = rng.normal(40, 10, (height, width, 3))
    objects = []
    for half in range(2):
        left = int(rng.integers(half * width // 2 + 1, half * width // 2 + 6))
        top = int(rng.integers(2, height // 3))
        right, bottom = (
            left + int(rng.integers(14, width // 2 - 6)),
            top + int(rng.integers(14, 30)),
        )
        label = int(rng.integers(1, 4))
        photo[top:bottom, left:right] = COLORS[label] + rng.normal(
            0, 10, (bottom - top, right - left, 3)
        )
        objects.append((label, (left, top, right, bottom)))
    return photo.clip(0, 255).astype(np.uint8), objects


def write_segmentation(root: Path, counts: dict[str, int]) -> Path:
    """A folder in ADE20K's convention: 1 is the ground, 2 to 4 are the rectangles' colors, and a
    frame of one pixel is unlabeled."""
    for part, (name, count) in enumerate(counts.items()):
        for folder in ("images", "annotations"):
            (root / folder / name).mkdir(parents=True)
        for i in range(count):
            photo, objects = rectangles(100 * part + i)
            labels = np.ones(photo.shape[:2], np.uint8)
            for label, (left, top, right, bottom) in objects:
                labels[top:bottom, left:right] = label + 1
            labels[[0, -1]] = labels[:, [0, -1]] = 0
            Image.fromarray(photo).save(root / "images" / name / f"{i}.jpg", quality=95)
            Image.fromarray(labels).save(root / "annotations" / name / f"{i}.png")
    (root / "classes.json").write_text(json.dumps(["ground", "red", "green", "blue"]))
    return root


def write_coco(root: Path, count: int) -> Path:
    """The same photos to train on and to evaluate on, with gaps between category ids."""
    (root / "annotations").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        photo, objects = rectangles(i)
        name = f"{i:012d}.jpg"
        for part in ("train2017", "val2017"):
            (root / part).mkdir(exist_ok=True)
            Image.fromarray(photo).save(root / part / name, quality=95)
        images.append(
            {"id": 10 * i, "file_name": name, "height": len(photo), "width": photo.shape[1]}
        )
        for label, (left, top, right, bottom) in objects:
            box = [left, top, right - left, bottom - top]
            outline = [left, top, right, top, right, bottom, left, bottom]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * i,
                    "category_id": 5 * label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": [outline],
                }
            )
    categories = [{"id": 5 * label, "name": f"color{label}"} for label in COLORS]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for part in ("train2017", "val2017"):
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root
