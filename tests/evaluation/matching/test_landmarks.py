"""`ibeton retrieve` on a small set in the layout of revisited Oxford."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibeton.__main__ import main as ibeton
from ibeton.evaluation.frozen.features import Extraction, normalized
from ibeton.evaluation.matching.landmarks import (
    Query,
    landmark_scores,
    multiscale_feature,
    read_landmarks,
)
from ibeton.evaluation.plain_pickle import read_pickle
from ibeton.evaluation.tasks import Subject
from ibeton.model.checkpoint import load_backbone

LANDMARKS, SHOTS = 5, 4


def scene(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((200, 160), Image.Resampling.BICUBIC)


@pytest.fixture
def oxford(tmp_path: Path) -> Path:
    """Photos of five scenes, the later shots of each cropped more; one query a scene."""
    root = tmp_path / "roxford5k"
    (root / "jpg").mkdir(parents=True)
    names, gnd = [], []
    for landmark in range(LANDMARKS):
        image = scene(landmark)
        image.save(root / "jpg" / f"query_{landmark}.jpg")
        for shot in range(SHOTS):
            edge = 6 * shot
            cut = image.crop((edge, edge, 200 - edge, 160))
            cut.save(root / "jpg" / f"scene_{landmark}_{shot}.jpg", quality=40)
            names.append(f"scene_{landmark}_{shot}")
        first = landmark * SHOTS
        shots = {"easy": [first], "hard": [first + 1, first + 2], "junk": [first + 3]}
        gnd.append({kind: np.array(group) for kind, group in shots.items()} | {"bbx": [0, 0, 9, 9]})
    queries = [f"query_{landmark}" for landmark in range(LANDMARKS)]
    write(root, {"imlist": names, "qimlist": queries, "gnd": gnd})
    return root


def write(root: Path, content: object) -> None:
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content, protocol=2))


def call(checkpoint: Path, root: Path, *also: object) -> list[str]:
    given = ("retrieve", "--checkpoint", checkpoint, "--data", root, "--device", "cpu", *also)
    return [str(part) for part in given]


def test_scenes_are_found_again(checkpoint, oxford, tmp_path, capsys):
    path = tmp_path / "scores.json"
    assert ibeton(call(checkpoint, oxford, "--json", path, "--untrained")) == 0
    for scores in json.loads(path.read_text())["scores"].values():
        assert list(scores) == ["roxford5k"]
        assert scores["roxford5k"]["medium_map"] > 60  # chance: 3 of 19
        assert scores["roxford5k"]["hard_map"] > 50
    assert "roxford5k medium_map | roxford5k hard_map" in capsys.readouterr().out


def test_medium_and_hard_by_hand():
    queries = [Query([0], [1], [2]), Query([3], [], [])]
    order = np.array([[2, 0, 4, 1, 3], [4, 3, 0, 1, 2]])
    scores = landmark_scores(order, queries)
    # medium: places 0 and 2 without junk 2; then place 1
    medium = (1 + 7 / 12) / 2, 1 / 4
    assert scores["medium_map"] == pytest.approx(100 * np.mean(medium))
    assert scores["medium_precision_at_1"] == 50
    # hard: photos 0 and 2 are taken out, so that 1 stands at place 1; the second query has no hard
    assert scores["hard_map"] == pytest.approx(25)
    assert scores["hard_precision_at_1"] == 0
    assert scores["hard_precision_at_5"] == 50
    perfect = np.array([[0, 1, 2, 3, 4], [3, 0, 1, 2, 4]])
    assert landmark_scores(perfect, queries)["medium_map"] == 100


def test_a_feature_is_the_mean_over_scales_of_whole_patches(checkpoint):
    backbone, config = load_backbone(checkpoint)
    image = torch.randint(0, 256, (3, 45, 67), dtype=torch.uint8)
    found = multiscale_feature(image, Subject("teacher", backbone, config, Extraction()))
    pixels = normalized(image.unsqueeze(0), "cpu")
    total = torch.zeros(32)
    with torch.no_grad():
        for size, kept in (((45, 67), (40, 64)), ((31, 47), (24, 40)), ((22, 33), (16, 32))):
            scale = {45: 1.0, 31: 2**-0.5, 22: 0.5}[size[0]]
            small = torch.nn.functional.interpolate(pixels, scale_factor=scale, mode="bilinear")
            assert small.shape[2:] == size
            total += backbone(small[:, :, : kept[0], : kept[1]])[0, 0]
    assert torch.allclose(found, total / total.norm(), atol=1e-6)


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_a_pickle_runs_no_code(oxford, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(read_landmarks(oxford).queries) == LANDMARKS
    path = tmp_path / "gnd_trap.pkl"
    for trap in (Trap(), {"imlist": [Trap()]}, print, np.array([Trap()], dtype=object)):
        path.write_bytes(pickle.dumps(trap))
        with pytest.raises(ValueError, match="which may run code"):
            read_pickle(path, "ground truth")
    assert not (tmp_path / "trapped").exists()


def test_another_layout_is_one_sentence_and_status_2(checkpoint, oxford, tmp_path, capsys):
    content = read_pickle(oxford / "gnd_roxford5k.pkl", "ground truth")

    def refused(says: str, root: Path = oxford) -> None:
        with pytest.raises(SystemExit) as stopped:
            ibeton(call(checkpoint, root, "--json", tmp_path / "scores.json"))
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert says in said[-1]
        assert sum(line.startswith("error") for line in said) == 1
        assert not (tmp_path / "scores.json").exists()

    refused("has 0 files gnd_*.pkl", tmp_path)
    write(oxford, {**content, "qimlist": content["qimlist"][:2]})
    refused("20 photos, 2 queries and ground truth of 5")
    write(oxford, {**content, "imlist": content["imlist"][:9]})
    refused("refers to photo 19, and has 9")
    write(oxford, [1, 2])
    refused("lacks imlist, qimlist, or gnd")
    (oxford / "gnd_roxford5k.pkl").write_bytes(b"nothing")
    refused("is not a valid ground truth")
    write(oxford, content)
    (oxford / "jpg" / "scene_0_0.jpg").unlink()
    refused("scene_0_0.jpg is missing")
    (oxford / "jpg" / "scene_0_0.jpg").write_bytes(b"nothing")
    refused("scene_0_0.jpg cannot be read")
