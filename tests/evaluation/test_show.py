"""The pictures: what they show is computed right, and each call writes one PNG."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibeton.evaluation.frozen.features import Extraction
from ibeton.evaluation.matching.views import are_right, cut_two, in_photo, mutual_nearest
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.pictures.attention import class_attention
from ibeton.evaluation.pictures.correspondence import scattered
from ibeton.evaluation.pictures.neighbors import nearest
from ibeton.evaluation.pictures.patterns import FRAME, Assigned, assign, central_patterns, tile
from ibeton.evaluation.show import main
from ibeton.model import ModelConfig, build, load_backbone
from ibeton.model.checkpoint import model_state, save_checkpoint
from ibeton.pipeline.sampling.draws import DRAW

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
HEAD = {"out_dim": 6, "hidden_dim": 16, "bottleneck_dim": 8}
PHOTOS = 12  # a class


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of small photos; the last of each is a copy of its first."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("caps", "shoes"):
        (root / name).mkdir()
        for i in range(PHOTOS):
            coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC)
            if i == PHOTOS - 1:
                image = Image.open(root / name / "00.png")
            image.save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("run") / "checkpoint.pt")


def saved(path: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(**{**SIZES, **HEAD, **settings})
    save_checkpoint(path, model_state(build(config)) | {"config": asdict(config)})
    return path


def test_attention_is_that_of_the_forward_pass(checkpoint):
    backbone, _ = load_backbone(checkpoint)
    seen = []

    def look(attention, inputs):
        qkv, [(images, tokens)] = inputs
        query, key, _ = attention.split_heads(qkv, images, tokens)
        scores = torch.einsum("bhnd,bhmd->bhnm", query, key) / query.shape[-1] ** 0.5
        seen.append(scores.softmax(dim=-1)[:, :, 0])

    backbone.blocks[-1].attn.register_forward_pre_hook(look)
    images = torch.randn(3, 3, 32, 40)
    maps = class_attention(backbone, images)
    backbone(images)
    assert maps.shape == (3, 2, 4, 5)
    assert torch.allclose(maps.flatten(2), seen[-1][:, :, 1:], atol=1e-6)
    assert torch.allclose(maps.sum(dim=(2, 3)) + seen[-1][:, :, 0], torch.ones(3, 2))


def test_patches_go_to_the_prototype_of_the_losss_target(checkpoint):
    head = build(ModelConfig(**SIZES, **HEAD)).teacher.head
    tokens, center = torch.randn(5, 16, 24), torch.randn(6)
    batches = [
        (np.array([0, 1, 3]), {"patches": tokens[:3].numpy()}),
        (np.array([4, 7]), {"patches": tokens[3:].numpy()}),
    ]
    assigned = assign(batches, head, center, "cpu")
    with torch.no_grad():
        _, logits = head(torch.cat([tokens[:, :1], tokens], dim=1))
        targets = ((logits - center) / 0.07).softmax(dim=-1)
    assert assigned.photos.tolist() == np.repeat([0, 1, 3, 4, 7], 16).tolist()
    assert assigned.places.tolist() == list(range(16)) * 5
    assert assigned.prototypes.tolist() == targets.argmax(dim=-1).flatten().tolist()
    ordered = targets.sort(dim=-1, descending=True).values
    odds = (ordered[..., 0] / ordered[..., 1]).log() * 0.07
    assert np.allclose(assigned.leads, odds.flatten(), atol=1e-4)


def test_patterns_take_one_patch_a_photo_and_the_furthest_lead_first():
    assigned = Assigned(
        photos=np.array([0, 0, 1, 2, 0, 1, 2, 3]),
        places=np.arange(8),
        prototypes=np.array([5, 5, 5, 5, 9, 9, 9, 4]),
        leads=np.array([0.1, 0.9, 0.2, 0.8, 1.0, 3.0, 2.0, 9.0], np.float32),
    )
    first, second = central_patterns(assigned, count=4, size=2)
    assert (first.prototype, first.places.tolist()) == (9, [5, 6])
    assert (second.prototype, second.places.tolist()) == (5, [1, 3])
    assert (second.photos.tolist(), second.patches, second.seen_in) == ([0, 2], 4, 3)
    assert len(central_patterns(assigned, count=1, size=1)) == 1
    with pytest.raises(ValueError, match="none of the 3 prototypes in use has patches in 4 photos"):
        central_patterns(assigned, count=1, size=4)


@pytest.mark.parametrize("place", [0, 7, 27, 56, 63])
def test_the_frame_is_about_the_patch(place):
    view = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    row, column = divmod(place, 8)
    view[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = torch.tensor(
        [200, 0, 0], dtype=torch.uint8
    ).view(3, 1, 1)
    image = tile(view, place, 8)
    rows, columns = np.nonzero((image == FRAME).all(axis=2))
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (24, 24)
    inside = image[rows.min() + 4 : rows.max() - 3, columns.min() + 4 : columns.max() - 3]
    assert np.abs(inside.mean(axis=(0, 1)) - (200, 0, 0)).max() < 12


def test_mutual_nearest_find_a_permutation():
    tokens, order = torch.randn(30, 8), torch.randperm(30)
    first, second, cosines = mutual_nearest(tokens, 3 * tokens[order])
    assert len(first) == 30
    assert torch.equal(order[second], first)
    assert torch.allclose(cosines, torch.ones(30))
    one_sided = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    first, second, _ = mutual_nearest(one_sided, torch.tensor([[1.0, 0.0]]))
    assert (first.tolist(), second.tolist()) == ([0], [0])


def test_scattered_places_do_not_touch():
    places = torch.randperm(64)
    chosen = scattered(places, 8, 9)
    rows = [divmod(int(places[i]), 8) for i in chosen]
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    for i, (row, column) in enumerate(rows):
        assert all(max(abs(row - r), abs(column - c)) > 1 for r, c in rows[:i])
    assert scattered(places, 8, 3) == chosen[:3]


@pytest.mark.parametrize("flip", [0, 1])
def test_points_of_a_view_are_found_in_the_photo(flip):
    """In a photo whose colors say where each pixel is."""
    y, x = np.mgrid[:200, :240]
    photo = Image.fromarray(np.stack((x, y, 0 * x), axis=2).astype(np.uint8))
    draws = np.zeros(2, dtype=DRAW)
    for name, values in {"top": (20, 60), "left": (30, 80), "height": 120, "width": 140}.items():
        draws[name] = values
    draws["flip"] = (flip, 0)
    views = cut_two(photo, draws, 64)
    points = np.array([(12.5, 40.5), (50.5, 20.5)])
    for view, box in zip(views, draws, strict=True):
        seen = [view[:2, int(row), int(column)].numpy() for column, row in points]
        assert np.abs(in_photo(box, points, 64) - seen).max() < 2
    same = in_photo(draws[0], points, 64)
    back = (same - np.array((80, 60))) / (140 / 64, 120 / 64)
    assert are_right(draws, [points, back], 64, 8).all()
    assert not are_right(draws, [points, back + np.array((9, 0))], 64, 8).any()


def test_the_nearest_are_other_photos_and_a_copy_comes_first(checkpoint, photos):
    backbone, _ = load_backbone(checkpoint)
    views = PhotoSet(photos, 32)
    found, cosines = nearest(backbone, views, [0, 2 * PHOTOS - 1, 3], 4, Extraction())
    assert found.shape == cosines.shape == (3, 4)
    assert found[0, 0] == PHOTOS - 1
    assert found[1, 0] == PHOTOS
    assert np.allclose(cosines[:2, 0], 1)
    assert (np.diff(cosines) <= 1e-6).all()
    for row, query in zip(found, (0, 2 * PHOTOS - 1, 3), strict=True):
        assert query not in row
        assert len(set(row)) == 4
    with pytest.raises(ValueError, match=r"--neighbors 24: .* has 24 readable photos"):
        nearest(backbone, views, [0], 24, Extraction())


CALLS = {
    "attention": "attention --photos 0 5",
    "attention at another size": "attention --photos 3 --image-size 48",
    "views": "correspondence --photos 1 2",
    "photos": "correspondence --photos 1 2 --pairs",
    "neighbors": "neighbors --neighbors 3",
    "before and after": "learned --photos 1 2 --neighbors 2",
    "patterns": "patterns --patterns 4",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_writes_one_png(call, checkpoint, photos, tmp_path, capsys):
    output = tmp_path / "picture.png"
    paths = ["--checkpoint", checkpoint, "--data", photos, "--output", output]
    main([*CALLS[call].split(), *map(str, paths), "--device", "cpu"])
    assert capsys.readouterr().out.strip() == str(output)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    pixels = np.asarray(Image.open(output).convert("RGB"))
    assert min(pixels.shape[:2]) > 150
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("attention --photos 24", "has photos 0 to 23"),
        ("attention --output picture.jpg", "ends in .png"),
        ("attention --output no/picture.png", "there is no folder no"),
        ("attention --image-size 30", "not a multiple of the patch size, 8"),
        ("attention --checkpoint nowhere.pt", "nowhere.pt does not exist"),
        ("neighbors --neighbors 0", "--neighbors 0: give at least 1"),
        ("correspondence --photos 1 2 3 --pairs", "give two for each row"),
        ("patterns --data nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(
    words, said, checkpoint, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    kind, *others = words.split()
    paths = ["--checkpoint", str(checkpoint), "--data", str(photos), "--output", "picture.png"]
    with pytest.raises(SystemExit) as stopped:
        main([kind, *paths, *others])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_a_network_lacks_cannot_be_drawn(photos, tmp_path, capsys):
    swin = saved(tmp_path / "swin.pt", arch="swin_t7", patch_size=32, **swin_sizes())
    content = torch.load(swin)
    alone = {k: v for k, v in content["teacher"].items() if k.startswith("backbone.")}
    save_checkpoint(tmp_path / "alone.pt", {"teacher": alone, "config": content["config"]})
    for words, said in (
        (("attention", swin), "a Swin has none"),
        (("patterns", tmp_path / "alone.pt"), "holds a backbone without a head"),
    ):
        kind, path = words
        output = tmp_path / "picture.png"
        paths = ["--checkpoint", path, "--data", photos, "--output", output]
        with pytest.raises(SystemExit):
            main([kind, *map(str, paths)])
        assert said in capsys.readouterr().err
        assert not output.exists()


def swin_sizes() -> dict[str, int]:
    return {"embed_dim": 192, "depth": 0, "num_heads": 0, "image_size": 64}


def test_a_picture_that_exists_is_kept(checkpoint, photos, tmp_path, capsys):
    output = tmp_path / "picture.png"
    output.write_bytes(b"mine")
    paths = ["--checkpoint", checkpoint, "--data", photos, "--output", output]
    with pytest.raises(SystemExit) as stopped:
        main(["attention", *map(str, paths), "--device", "cpu"])
    assert stopped.value.code == 2
    assert f"{output} exists; --overwrite replaces it" in capsys.readouterr().err
    assert output.read_bytes() == b"mine"
    main(["attention", *map(str, paths), "--device", "cpu", "--overwrite"])
    assert Image.open(output).size[0] > 150
