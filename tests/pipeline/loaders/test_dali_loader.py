"""The DALI loader on real graphs, without a GPU: DALI's CPU decoder and the compiled croppers.

Found, in 0 .. 255: no difference to the pil loader at all, as DALI's CPU decoder is libjpeg-turbo,
like Pillow's, with the same settings. To the ffcv loader, which asks for the fast DCT, 0.9 in the
mean and 1.7 in the mean of a view at most; of 300 ImageNet photos 1.1 and 2.5.
"""

import io
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from held import held, wait_for_no_more_than
from made_photos import EITHER, UNREADABLE
from PIL import Image
from pillow_parity import SAME_ARITHMETIC
from smooth_photos import smooth_photo
from torch import Tensor

from ibeton.pipeline import Batch, PipelineConfig, build_loader
from ibeton.pipeline.batch import BatchPlan, Crops, normalized
from ibeton.pipeline.crops.cpu import cut_views
from ibeton.pipeline.loaders import LOADERS, choose_loader
from ibeton.pipeline.loaders import pil as pil_loader
from ibeton.pipeline.sampling.draws import ViewSpec

pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed: make setup")
from ibeton.pipeline.loaders import dali as dali_loader
from ibeton.pipeline.loaders.dali_decode import DaliDecoder
from ibeton.pipeline.store.decode import UnreadableData
from ibeton.pipeline.store.joined import open_all

SMALL = PipelineConfig(
    loader="dali",
    batch_size=8,
    workers=2,
    seed=3,
    local_crops_number=2,
    global_crops_size=32,
    local_crops_size=16,
    patch_size=8,
)
MEAN_BOUND = 3.0  # of the difference that a decoder makes to one view, in 0 .. 255
Array = np.ndarray


def batches_of(
    path: Path, epoch: int = 0, first_step: int = 0, share: tuple[int, int] = (0, 1), **changes: Any
) -> list[Batch]:
    """The batches of an epoch; `share` is (rank, world size)."""
    loader = build_loader(replace(SMALL, data=str(path), **changes), "cpu", *share)
    try:
        return list(loader.epoch(epoch, first_step))
    finally:
        loader.close()


class PilHere:
    """What the pil loader does, in this process instead of workers, whose start takes seconds."""

    def __init__(self, config: PipelineConfig) -> None:
        self._views = pil_loader._Views(config, open_all(config.data))

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, Crops], None, None]:
        for plan in plans:
            samples = [self._views[plan.epoch, index] for index in plan.indices.tolist()]
            batch = pil_loader._collate(samples)
            assert not isinstance(batch, Exception)
            global_crops, local_crops, used, _ = batch
            crops = (torch.as_tensor(global_crops), torch.as_tensor(local_crops))
            yield plan, Crops(*crops, torch.from_numpy(used))

    def close(self) -> None:
        pass


def pil_batches_of(path: Path, epoch: int = 0, **changes: Any) -> list[Batch]:
    config = replace(SMALL, data=str(path), loader="pil", **changes)
    loader = build_loader(config)
    loader._cutter = PilHere(config)
    batches = list(loader.epoch(epoch))
    loader.close()
    return batches


def assert_same(ours: list[Batch], theirs: list[Batch], bound: float = 0.0) -> None:
    """The same samples in the same order; views differ by `bound` at most, in the mean."""
    scale = 255 * torch.tensor(SMALL.std).view(3, 1, 1)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.masks, other.masks)
        for name in ("global_crops", "local_crops"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert float(((a - b) * scale).abs().mean(dim=(-3, -2, -1)).max()) <= bound


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen files: JPEGs of all kinds, other formats under a JPEG's name, and damaged ones."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(1)
    photos = [smooth_photo(rng, 60 + 7 * i, 90) for i in range(16)]
    files = [encoded(photo) for photo in photos]
    turned = Image.Exif()
    turned[0x0112] = 6
    files[1] = encoded(photos[1], exif=turned)
    files[2] = encoded(photos[2].convert("L"))
    files[3] = encoded(photos[3].convert("CMYK"))
    files[4] = encoded(photos[4], "PNG")
    files[5] = files[5][: len(files[5]) // 2]  # cut short
    files[6] = files[6][:40]
    files[7] = b""
    files[9] = files[9][:-300] + bytes(298) + files[9][-2:]  # a hole in a file that ends well
    files[10] = files[10] + b"trailing bytes"
    files[11] = encoded(photos[11], progressive=True, subsampling=0)
    files[15] = b"<html>404 Not Found</html>"
    for i, data in enumerate(files):
        (root / f"{i:02d}.jpg").write_bytes(data)
    return root


@pytest.mark.parametrize("source", ["photo_folder", "beton", "raw_beton"])
def test_views_are_the_pil_loaders(source: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(source)
    bound = 0.0 if SAME_ARITHMETIC else MEAN_BOUND
    assert_same(batches_of(path, epoch=1), pil_batches_of(path, epoch=1), bound)


def test_views_are_the_ffcv_loaders(beton: Path) -> None:
    if problem := LOADERS["ffcv"].problem():
        pytest.skip(problem)
    assert_same(batches_of(beton), batches_of(beton, loader="ffcv"))


def test_every_sample_comes_once_an_epoch_with_its_label(photo_folder: Path) -> None:
    batches = batches_of(photo_folder)
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(48))
    for batch in batches:
        assert torch.equal(batch.labels, batch.indices // 12)  # twelve photos in each class
        assert batch.global_crops.shape == (2, 8, 3, 32, 32)
        assert batch.local_crops.shape == (2, 8, 3, 16, 16)
        assert batch.global_crops.dtype == torch.float32


def test_neither_workers_nor_batches_ahead_change_anything(beton: Path) -> None:
    assert_same(batches_of(beton, workers=1, batches_ahead=1), batches_of(beton, workers=3))


def test_recipes_without_local_views_work(beton: Path) -> None:
    batches = batches_of(beton, local_crops_number=0)
    assert batches[0].local_crops.shape[:2] == (0, 8)


def test_two_ranks_see_together_what_one_sees(beton: Path) -> None:
    whole = batches_of(beton, batch_size=16)
    halves = [batches_of(beton, share=(rank, 2)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch.indices, torch.cat([first.indices, second.indices]))
        both = torch.cat([first.global_crops, second.global_crops], dim=1)
        assert torch.equal(batch.global_crops, both)


def test_an_epoch_can_be_entered_in_its_middle(beton: Path) -> None:
    assert_same(batches_of(beton, epoch=2, first_step=4), batches_of(beton, epoch=2)[4:])


def test_epochs_left_half_way_leave_nothing(beton: Path) -> None:
    loader = build_loader(replace(SMALL, data=str(beton)))
    list(loader.epoch(0))

    before = held()
    for epoch in range(6):
        next(loader.epoch(epoch))
    abandoned = loader.epoch(6)
    next(abandoned)
    loader.close()  # with an epoch still open
    wait_for_no_more_than(before)
    assert_same(list(loader.epoch(1)), batches_of(beton, epoch=1))
    loader.close()


def test_an_epoch_in_place_of_an_open_one_is_whole(beton: Path) -> None:
    loader = build_loader(replace(SMALL, data=str(beton)))
    left = loader.epoch(0)
    next(left)
    assert_same(list(loader.epoch(1)), batches_of(beton, epoch=1))
    loader.close()


def test_damaged_and_unusual_photos_are_treated_as_by_the_pil_loader(mixed_folder: Path) -> None:
    loader = build_loader(replace(SMALL, data=str(mixed_folder)))
    for epoch in (0, 1):
        assert_same(list(loader.epoch(epoch)), pil_batches_of(mixed_folder, epoch), MEAN_BOUND)
    loader.close()
    assert loader.unreadable[7] == "07.jpg: the file is empty"
    assert sorted(loader.unreadable) == [5, 6, 7, 9, 15]


def test_a_photo_that_dali_refuses_costs_its_batch_nothing(
    mixed_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checked = batches_of(mixed_folder)
    monkeypatch.setattr(dali_loader, "plain_jpeg_size", lambda data: (1, 1) if data else None)
    loader = build_loader(replace(SMALL, data=str(mixed_folder)))
    for _ in range(2):
        assert_same(list(loader.epoch(0)), checked)
    loader.close()
    refused = [name for name in caplog.messages if "DALI refuses" in name]
    assert len(refused) == len(set(refused)) > 0, "each is named once"
    assert sorted(loader.unreadable) == [5, 6, 7, 9, 15]


def test_a_beton_whose_photo_has_another_size_is_told(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = build_loader(replace(SMALL, data=str(beton)))
    loader.photos.widths[17] += 1  # type: ignore[attr-defined]
    used = torch.cat([batch.indices for batch in loader.epoch(0)]).tolist()
    loader.close()
    assert list(loader.unreadable) == [17]
    assert used.count(18) == 2


def test_hard_jpegs_are_given_what_a_loader_owes(hard: tuple[Path, dict[str, str]]) -> None:
    folder, owed = hard
    loader = build_loader(replace(SMALL, data=str(folder), batch_size=7))
    names = [loader.photos.name(index) for index in range(len(loader.photos))]
    ours = list(loader.epoch(0))
    loader.close()
    assert_same(ours, pil_batches_of(folder, batch_size=7), MEAN_BOUND)
    unreadable = {names[index] for index in loader.unreadable}
    must, may = ({n for n in names if owed[n] == owes} for owes in (UNREADABLE, EITHER))
    assert must <= unreadable <= must | may
    assert ".hidden.jpg" not in names


def test_an_error_in_the_thread_reaches_the_training_process(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *rest: Any) -> Any:
        raise OSError("the disk went away")

    threads = threading.active_count()
    monkeypatch.setattr(dali_loader.DaliPixels, "_read_one", broken)
    with pytest.raises(OSError, match="the disk went away"):
        batches_of(beton)
    assert threading.active_count() <= threads


def test_a_data_set_of_rubbish_is_an_error_not_an_endless_search(tmp_path: Path) -> None:
    for i in range(16):
        (tmp_path / f"{i}.jpg").write_bytes(b"rubbish")
    with pytest.raises(UnreadableData, match="16 photos in a row cannot be read, from"):
        batches_of(tmp_path)


def test_the_decoder_halves_a_batch_until_the_damaged_photo_stands_alone() -> None:
    rng = np.random.default_rng(2)
    files = [encoded(smooth_photo(rng, 50, 40 + i)) for i in range(6)]
    files[3] = files[3][: len(files[3]) // 3]
    jpegs = [np.frombuffer(data, np.uint8) for data in files]
    decoder = DaliDecoder(torch.device("cpu"), batch_size=6, threads=1)
    for _ in range(2):
        decoder.start(jpegs)
        photos = decoder.finish()
        assert [photo is None for photo in photos] == [i == 3 for i in range(6)]
    assert decoder.finish() == []
    decoder.start(jpegs[:2])
    decoder.abandon()
    decoder.start(jpegs[4:])
    assert [tuple(photo.shape) for photo in decoder.finish()] == [(44, 50, 3), (45, 50, 3)]


def test_dali_is_chosen_when_asked_for_and_on_gpus_without_ffcv(
    beton: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, auto = (replace(SMALL, data=str(beton), loader=kind) for kind in ("dali", "auto"))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_loader(asked, cpu) == (LOADERS["dali"], "dali, by --loader")
    no_turbojpeg = replace(LOADERS["ffcv"], problem=lambda: "libturbojpeg is not installed")
    monkeypatch.setitem(LOADERS, "ffcv", no_turbojpeg)
    assert choose_loader(auto, cpu)[0].name == "pil"
    for data in (beton, photo_folder):
        kind, reason = choose_loader(replace(auto, data=str(data)), gpu)
        assert kind.name == "dali"
        assert "libturbojpeg is not installed" in reason
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert choose_loader(auto, gpu)[0].name == "pil"
    with pytest.raises(ValueError, match=r"--loader dali: nvidia-dali is not installed: `pip inst"):
        build_loader(asked)


class CropperOfTheCpu:
    """Stands in for GpuCropper, which test_gpu_crops.py holds against the CPU's croppers."""

    def __init__(
        self,
        views: list[ViewSpec],
        global_views: int,
        mean: Any,
        std: Any,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._device, self._dtype = device, dtype
        self._moments = torch.tensor(mean), torch.tensor(std)
        self._sizes = views[0].size, views[-1].size
        self._views = global_views

    def cut(
        self, pixels: Tensor, offsets: Array, heights: Array, widths: Array, draws: Array
    ) -> tuple[Tensor, Tensor]:
        assert (pixels.dtype, pixels.dim(), self._dtype) == (torch.uint8, 1, torch.float32)
        (count, views), (large, small) = draws.shape, self._sizes
        global_crops = np.empty((count, self._views, 3, large, large), np.uint8)
        local_crops = np.empty((count, views - self._views, 3, small, small), np.uint8)
        for b, (offset, height, width) in enumerate(zip(offsets, heights, widths, strict=True)):
            photo = pixels.numpy()[offset : offset + 3 * height * width]
            photo = photo.reshape(height, width, 3)
            cut_views(photo, draws[b], global_crops[b], local_crops[b])
        both = torch.from_numpy(global_crops), torch.from_numpy(local_crops)
        return normalized(both[0], *self._moments), normalized(both[1], *self._moments)


def test_the_gpu_way_gives_the_same_batches(
    mixed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    gpu_stream = pytest.importorskip("ibeton.pipeline.loaders.gpu_stream")
    monkeypatch.setattr(gpu_stream, "GpuCropper", CropperOfTheCpu)

    def crops(context: Any) -> Any:
        return gpu_stream.GpuCrops(context, dali_loader.DaliPixels(context))

    monkeypatch.setitem(LOADERS, "dali", replace(LOADERS["dali"], crops=crops))
    loader = build_loader(replace(SMALL, data=str(mixed_folder)))
    assert_same(list(loader.epoch(0)), batches_of(mixed_folder))
    loader.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_views_are_the_cpus_within_the_decoders_rounding(mixed_folder: Path) -> None:
    loader = build_loader(replace(SMALL, data=str(mixed_folder)), "cuda")
    for epoch in (0, 1):
        batches = [
            replace(
                batch, global_crops=batch.global_crops.cpu(), local_crops=batch.local_crops.cpu()
            )
            for batch in loader.epoch(epoch)
        ]
        assert_same(batches, batches_of(mixed_folder, epoch), MEAN_BOUND)
    loader.close()
    assert sorted(loader.unreadable) == [5, 6, 7, 9, 15]
