"""The loaders as a run sees them: real files, real threads, real worker processes."""

import itertools
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pillow_parity import SAME_ARITHMETIC, assert_pillows

from ibeton.command import Failure
from ibeton.pipeline import Batch, PipelineConfig, build_loader
from ibeton.pipeline.crops.reference import cut_views_reference
from ibeton.pipeline.loaders import LOADERS, choose_crops, choose_loader
from ibeton.pipeline.sampling.draws import draw_views
from ibeton.pipeline.store.beton import BetonReader

pytestmark = pytest.mark.skipif(
    bool(LOADERS["ffcv"].problem()), reason="libturbojpeg is not installed: make ffcv"
)

SMALL = PipelineConfig(
    batch_size=8,
    workers=1,
    seed=3,
    local_crops_number=3,
    global_crops_size=64,
    local_crops_size=32,
    patch_size=8,
)


def batches_of(path: Path, epoch: int = 0, first_step: int = 0, **changes: Any) -> list[Batch]:
    loader = build_loader(replace(SMALL, data=str(path), **changes))
    try:
        return list(loader.epoch(epoch, first_step))
    finally:
        loader.close()


def by_sample(batches: list[Batch]) -> dict[int, tuple[torch.Tensor, ...]]:
    """index -> (global crops, local crops, masks, label) of that sample."""
    samples = {}
    for batch in batches:
        for i, index in enumerate(batch.indices.tolist()):
            assert index not in samples, "a sample came twice in one epoch"
            samples[index] = (
                batch.global_crops[:, i],
                batch.local_crops[:, i],
                batch.masks[:, i],
                batch.labels[i],
            )
    return samples


def assert_same_samples(one: list[Batch], other: list[Batch]) -> None:
    first, second = by_sample(one), by_sample(other)
    assert first.keys() == second.keys()
    for index in first:
        for a, b in zip(first[index], second[index], strict=True):
            assert torch.equal(a, b), f"sample {index} differs"


@pytest.mark.parametrize("kind", ["ffcv", "pil"])
def test_every_sample_comes_once_an_epoch_with_its_label(beton: Path, kind: str) -> None:
    batches = batches_of(beton, loader=kind)
    samples = by_sample(batches)
    assert sorted(samples) == list(range(48))
    labels = BetonReader(beton).labels
    assert all(int(sample[3]) == labels[index] for index, sample in samples.items())
    batch = batches[0]
    assert batch.global_crops.shape == (2, 8, 3, 64, 64)
    assert batch.local_crops.shape == (3, 8, 3, 32, 32)
    assert batch.masks.shape == (2, 8, 8, 8)
    assert batch.masks.dtype == torch.bool
    assert batch.global_crops.dtype == torch.float32


@pytest.mark.parametrize("kind", ["ffcv", pytest.param("pil", marks=pytest.mark.slow)])
def test_workers_and_batch_size_change_no_sample(beton: Path, kind: str) -> None:
    one = batches_of(beton, epoch=2, loader=kind, workers=1, batch_size=8)
    other = batches_of(beton, epoch=2, loader=kind, workers=2, batch_size=16)
    assert_same_samples(one, other)
    order, wide = (torch.cat([batch.indices for batch in run]) for run in (one, other))
    assert torch.equal(order, wide)


def test_other_epochs_and_seeds_give_other_crops_and_orders(beton: Path) -> None:
    base = batches_of(beton)
    for changed in (batches_of(beton, epoch=1), batches_of(beton, seed=4)):
        assert not torch.equal(base[0].indices, changed[0].indices)
        first, second = by_sample(base), by_sample(changed)
        assert not any(torch.equal(first[i][0], second[i][0]) for i in first)


def test_ffcv_crops_are_pillows_on_the_same_pixels(raw_beton: Path) -> None:
    config = replace(SMALL, data=str(raw_beton))
    views, reader = config.views(), BetonReader(raw_beton)
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    for index, sample in by_sample(batches_of(raw_beton, epoch=1)).items():
        pixels = reader.pixels(index)
        draws = draw_views(views, config.seed, 1, index, *pixels.shape[:2])
        crops = cut_views_reference(Image.fromarray(pixels), draws, [view.size for view in views])
        for ours, theirs in (
            (sample[0], np.stack(crops[:2])),
            (sample[1], np.stack(crops[2:])),
        ):
            scale, shift = 255 * std.view(3, 1, 1), 255 * mean.view(3, 1, 1)
            pixels_of_ours = (ours * scale + shift).round().permute(0, 2, 3, 1)
            assert_pillows(pixels_of_ours.to(torch.uint8).numpy(), theirs)


@pytest.mark.skipif(not SAME_ARITHMETIC, reason="this Pillow computes in another way")
@pytest.mark.parametrize("source", ["beton", pytest.param("raw_beton", marks=pytest.mark.slow)])
def test_pil_and_ffcv_loaders_give_the_same_bytes(
    source: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(source)
    assert_same_samples(batches_of(path, loader="pil"), batches_of(path, loader="ffcv"))


def test_a_folder_gives_what_its_beton_gives(photo_folder: Path, beton: Path) -> None:
    assert_same_samples(batches_of(photo_folder, loader="pil"), batches_of(beton, loader="pil"))


def test_two_ranks_share_each_global_batch(beton: Path) -> None:
    whole = batches_of(beton, batch_size=16)
    halves = []
    for rank in (0, 1):
        loader = build_loader(replace(SMALL, data=str(beton)), rank=rank, world_size=2)
        halves.append(list(loader.epoch(0)))
        loader.close()
    assert len(whole) == len(halves[0]) == len(halves[1])
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch.indices, torch.cat([first.indices, second.indices]))
        assert torch.equal(
            batch.global_crops, torch.cat([first.global_crops, second.global_crops], dim=1)
        )
        assert torch.equal(batch.masks, torch.cat([first.masks, second.masks], dim=1))


def test_an_epoch_can_be_entered_in_its_middle(beton: Path) -> None:
    whole, rest = batches_of(beton, epoch=5), batches_of(beton, epoch=5, first_step=4)
    assert len(rest) == len(whole) - 4
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.global_crops, b.global_crops)


def test_epochs_left_early_leave_no_thread(beton: Path) -> None:
    loader = build_loader(replace(SMALL, data=str(beton), batches_ahead=1))
    next(iter(loader.epoch(0)))
    before = threading.active_count()
    for epoch in range(6):
        next(iter(loader.epoch(epoch)))
    loader.close()
    assert threading.active_count() <= before


@pytest.fixture
def damaged(beton: Path, tmp_path: Path) -> tuple[Path, int]:
    """A .beton in which one JPEG lost its second half, and that photo's index."""
    path, index = tmp_path / "damaged.beton", 17
    shutil.copy(beton, path)
    reader = BetonReader(beton)
    data = bytes(reader.photo_bytes(index))
    content = path.read_bytes()
    at = content.index(data)
    half = len(data) // 2
    path.write_bytes(content[: at + half] + b"\0" * (len(data) - half) + content[at + len(data) :])
    return path, index


@pytest.mark.parametrize("kind", ["ffcv", "pil"])
def test_a_damaged_photo_is_named_and_replaced(
    damaged: tuple[Path, int], beton: Path, kind: str
) -> None:
    path, bad = damaged
    loader = build_loader(replace(SMALL, data=str(path), loader=kind))
    batches = list(loader.epoch(0))
    loader.close()
    assert list(loader.unreadable) == [bad]
    used = [i for batch in batches for i in batch.indices.tolist()]
    assert bad not in used
    assert used.count(bad + 1) == 2
    sound = by_sample(batches_of(beton, loader=kind))
    for batch in batches:
        for i, index in enumerate(batch.indices.tolist()):
            if index not in (bad, bad + 1):
                assert torch.equal(batch.global_crops[:, i], sound[index][0])


def test_an_error_in_a_thread_reaches_the_training_process(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ibeton.pipeline.loaders import ffcv

    def broken(task: Any, *rest: Any) -> Any:
        if 17 in task.indices:
            raise OSError("the disk went away")
        return original(task, *rest)

    original = ffcv.work_on
    monkeypatch.setattr(ffcv, "work_on", broken)
    before = set(threading.enumerate())
    loader = build_loader(replace(SMALL, data=str(beton)))
    with pytest.raises(OSError, match="the disk went away"):
        list(loader.epoch(0))
    assert not set(threading.enumerate()) - before
    monkeypatch.undo()
    assert_same_samples(list(loader.epoch(0)), batches_of(beton))
    loader.close()


@pytest.mark.parametrize("kind", ["ffcv", "dali", pytest.param("pil", marks=pytest.mark.slow)])
def test_the_next_epoch_is_prepared_while_the_last_batches_are_used(beton: Path, kind: str) -> None:
    if problem := LOADERS[kind].problem():
        pytest.skip(problem)
    loader = build_loader(replace(SMALL, data=str(beton), loader=kind))
    planned: list[tuple[int, int]] = []
    plans = loader._plans

    def noted(epoch: int, step: int) -> Any:
        for number, plan in enumerate(plans(epoch, step)):
            planned.append((plan.epoch, number))
            yield plan

    loader._plans = noted  # type: ignore[method-assign]
    first = list(loader.epoch(0))
    while planned[-1][0] == 0:
        time.sleep(0.01)
    assert planned[-1][0] == 1, "the second epoch has been begun, though nobody asked for it"
    second = list(loader.epoch(1))
    assert [number for _, number in planned] == list(range(len(planned))), "in one go"
    loader.close()
    assert_same_samples(first, batches_of(beton, loader=kind))
    assert_same_samples(second, batches_of(beton, epoch=1, loader=kind))


@pytest.mark.parametrize("kind", ["ffcv", "dali", "pil"])
def test_a_file_that_is_cut_short_while_in_use_is_an_error(
    beton: Path, tmp_path: Path, kind: str
) -> None:
    if problem := LOADERS[kind].problem():
        pytest.skip(problem)
    path = tmp_path / "photos.beton"
    shutil.copy(beton, path)
    loader = build_loader(replace(SMALL, data=str(path), loader=kind, batches_ahead=1))
    next(loader.epoch(0))
    os.truncate(path, path.stat().st_size // 8)
    epochs = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in (1, 2))
    with pytest.raises(OSError, match=r"photos\.beton ends at byte .* cut short or replaced"):
        list(epochs)
    loader.close()


def test_a_killed_worker_process_is_an_error_not_a_hang(beton: Path) -> None:
    loader = build_loader(replace(SMALL, data=str(beton), loader="pil", workers=2))
    batches = loader.epoch(0)
    next(batches)
    workers = loader._cutter._loader._iterator._workers  # type: ignore[attr-defined]
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker|exited"):
        list(batches)
    loader.close()


def test_photos_that_changed_since_they_were_listed_are_an_error(tmp_path: Path) -> None:
    """The workers of pil list them again: a file more, and all labels would move."""
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    changes = {"data": str(tmp_path), "loader": "pil", "workers": 1, "batch_size": 4}
    loader = build_loader(replace(SMALL, **changes))
    shutil.copy(tmp_path / "a/1.jpg", tmp_path / "a/0.jpg")
    with pytest.raises(Failure, match="have changed since they were listed"):
        next(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "--data is missing"),
        ({"data": "/nowhere/photos.beton"}, "/nowhere/photos.beton"),
        ({"data": "/nowhere/photos"}, "/nowhere/photos"),
        ({"global_crops_size": 60}, "--global-crops-size 60"),
        ({"local_crops_number": 255}, "at most 256 views"),
        ({"local_crops_size": 4}, "--local-crops-size 4"),
        ({"batch_size": 100}, "--batch-size 100"),
        ({"loader": "dali9"}, "--loader dali9"),
        ({"pred_ratio": (0.3,)}, "ratio"),
        ({"local_crops_scale": (0.3, 0.1)}, "--local-crops-scale"),
        ({"color_jitter": (0.4, 0.4, 0.2, 0.6)}, "--color-jitter"),
        ({"gray_p": 1.5}, "--gray-p 1.5"),
    ],
)
def test_bad_settings_are_named(beton: Path, changes: dict[str, Any], message: str) -> None:
    config = replace(SMALL, **{"data": str(beton), **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_loader(config)


def test_ffcv_says_how_to_convert_a_folder(photo_folder: Path) -> None:
    with pytest.raises(ValueError, match="ibeton convert"):
        build_loader(replace(SMALL, data=str(photo_folder), loader="ffcv"))


def test_sources_that_make_the_loader_slow_are_named() -> None:
    several = replace(SMALL, data=("a.beton", "b", "c.tar"))
    _, reason = choose_loader(several, torch.device("cpu"))
    assert reason == (
        "pil, the slowest loader, as the photos of b, c.tar are not in a .beton file; to make one:"
        " ibeton convert b photos.beton"
    )
    with pytest.raises(ValueError, match=r"--loader ffcv reads \.beton files only: the photos are"):
        choose_loader(replace(SMALL, data=("b",), loader="ffcv"), torch.device("cpu"))


def test_views_are_cut_where_that_is_asked_for(beton: Path) -> None:
    here, gpu = torch.device("cpu"), torch.device("cuda")
    auto, on_gpu, on_cpu = (
        replace(SMALL, data=str(beton), crops_on=where) for where in ("auto", "gpu", "cpu")
    )
    kinds = [LOADERS[name] for name in ("ffcv", "dali", "pil")]
    assert [choose_crops(auto, kind, gpu) for kind in kinds] == ["gpu", "gpu", "cpu"]
    assert [choose_crops(on_gpu, kind, gpu) for kind in kinds[:2]] == ["gpu", "gpu"]
    assert {choose_crops(on_cpu, kind, gpu) for kind in kinds} == {"cpu"}
    assert {choose_crops(auto, kind, here) for kind in kinds} == {"cpu"}
    assert choose_loader(auto, gpu)[1].endswith("cut on the GPU")
    assert choose_loader(on_cpu, gpu)[1].endswith("cut on the CPU")
    with pytest.raises(ValueError, match="--crops-on gpu: the pil loader cuts on the CPU"):
        choose_crops(on_gpu, LOADERS["pil"], gpu)
    with pytest.raises(ValueError, match="--crops-on gpu: the device is cpu"):
        build_loader(on_gpu)
    with pytest.raises(ValueError, match="--crops-on tpu: expected one of auto, gpu, cpu"):
        build_loader(replace(auto, crops_on="tpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["ffcv", "dali"])
def test_beside_a_gpu_the_workers_cut_the_same_views(beton: Path, kind: str) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    loader = build_loader(replace(SMALL, data=str(beton), loader=kind, crops_on="cpu"), "cuda")
    beside, alone = list(loader.epoch(0)), batches_of(beton, loader=kind)
    loader.close()
    for one, other in zip(beside, alone, strict=True):
        assert one.global_crops.is_cuda
        for views, expected in (
            (one.global_crops, other.global_crops),
            (one.local_crops, other.local_crops),
        ):
            torch.testing.assert_close(views.cpu(), expected, rtol=0, atol=1e-5)
