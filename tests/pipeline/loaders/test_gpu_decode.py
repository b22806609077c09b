"""Batches that a GPU and CPU threads decode together, with torchvision's CPU decoder as a GPU's."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from smooth_photos import smooth_photo
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from ibeton.pipeline import PipelineConfig, build_loader
from ibeton.pipeline.batch import BatchPlan, Decoded
from ibeton.pipeline.loaders import LOADERS
from ibeton.pipeline.loaders.context import context_of
from ibeton.pipeline.loaders.ffcv import FfcvPixels
from ibeton.pipeline.loaders.gpu_decode import (
    GpuDecoding,
    choose_decoding,
    gpu_share,
    judged,
    nvjpeg_problem,
    row_means,
)
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.store.beton import BetonReader
from ibeton.pipeline.store.turbojpeg import Decoder

if problem := LOADERS["ffcv"].problem():
    pytest.skip(problem, allow_module_level=True)
COUNT, SIZE = 48, 8
PLANS = [
    BatchPlan(0, np.random.default_rng(seed).permutation(COUNT)[i : i + SIZE])
    for seed in range(2)
    for i in range(0, COUNT, SIZE)
]
SMALL = PipelineConfig(
    batch_size=SIZE, local_crops_number=2, global_crops_size=32, local_crops_size=16, patch_size=8
)
Fault = Callable[[Tensor], Tensor]  # what becomes of a photo's planes


class Planes:
    """Decodes on the CPU, as a GPU would. `faults`: bytes of a JPEG -> what goes wrong with it."""

    device = torch.device("cpu")

    def __init__(self, faults: dict[bytes, Fault] | None = None) -> None:
        self.faults = faults or {}
        self.decoded: list[bytes] = []

    def __call__(self, jpegs: list[Tensor]) -> list[Tensor]:
        stored = [jpeg.numpy().tobytes() for jpeg in jpegs]
        photos = decode_jpeg(jpegs, ImageReadMode.RGB)
        photos = [
            self.faults.get(data, lambda planes: planes)(photo)
            for data, photo in zip(stored, photos, strict=True)
        ]
        self.decoded += stored
        return photos


def refuse(planes: Tensor) -> Tensor:
    raise RuntimeError("nvJPEG: status 5")


OTHER = np.asarray(smooth_photo(np.random.default_rng(9), 120, 90))
FAULTS: dict[str, Fault] = {
    "another photo's memory": lambda planes: torch.from_numpy(np.resize(OTHER, planes.shape)),
    "zeros": torch.zeros_like,
    "its lower half is missing": lambda planes: (
        planes * (torch.arange(len(planes[0])) < len(planes[0]) / 2)[:, None]
    ),
    "turned": lambda planes: planes.transpose(1, 2),
    "refused": refuse,
}


def stream_of(path: Path, gpu: GpuDecoding) -> tuple[list[tuple[BatchPlan, Decoded]], Replacements]:
    """Two epochs, and the photos that were lost."""
    reader = BetonReader(path)
    config = replace(SMALL, data=str(path), workers=2, batches_ahead=1, seed=3)
    context = context_of(config, reader, gpu_decoding=gpu)
    batches = []
    for plan, decoded in FfcvPixels(context).stream(iter(PLANS)):
        batches.append((plan, replace(decoded, parts=[torch.cat(decoded.parts).clone()])))
    return batches, context.replacements


def assert_whole(path: Path, batches: list[tuple[BatchPlan, Decoded]]) -> None:
    """Every photo is there and looks like itself."""
    reader = BetonReader(path)
    assert len(batches) == len(PLANS)
    for (plan, decoded), expected in zip(batches, PLANS, strict=True):
        assert plan is expected
        assert decoded.indices.tolist() == plan.indices.tolist()
        for b, index in enumerate(plan.indices.tolist()):
            pixels, begin = reader.pixels(index), int(decoded.offsets[b])
            assert pixels.shape[:2] == (decoded.heights[b], decoded.widths[b])
            photo = decoded.parts[0][begin : begin + pixels.size].numpy().reshape(pixels.shape)
            assert np.abs(photo.astype(int) - pixels).mean() < 2, index


def test_the_gpu_takes_its_share_of_photos_that_a_cpu_has_seen(beton: Path) -> None:
    decoder = Planes()
    gpu = GpuDecoding(BetonReader(beton), decoder)
    gpu.gpu_rate = 1e9
    batches, replacements = stream_of(beton, gpu)
    assert_whole(beton, batches)
    assert not replacements.unreadable
    assert 0 < len(decoder.decoded) < COUNT * 2
    stored = [BetonReader(beton).photo_bytes(i) for i in range(COUNT)]
    assert set(decoder.decoded) <= set(stored)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_photo_that_the_gpu_did_not_decode_is_decoded_by_the_cpu(beton: Path, fault: str) -> None:
    reader = BetonReader(beton)
    broken = [5, 6, 30]
    decoder = Planes({reader.photo_bytes(i): FAULTS[fault] for i in broken})
    gpu = GpuDecoding(reader, decoder)
    gpu.gpu_rate, gpu.cpu_rate = 1e9, 1.0  # it gets all that it may
    batches, replacements = stream_of(beton, gpu)
    assert_whole(beton, batches)
    assert not replacements.unreadable
    assert not gpu.chosen(np.array(broken)).any(), "the CPU decodes it from then on"
    assert gpu.chosen(np.array([0, 1, 2])).all()


def test_damaged_photos_never_reach_the_gpu(beton: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.beton"
    path.write_bytes(beton.read_bytes())
    start, size = (int(x[5]) for x in (BetonReader(path).pointers, BetonReader(path).sizes))
    with path.open("r+b") as file:
        file.seek(start + size // 2)
        file.write(bytes(size - size // 2 - 2))  # zeros, and the end marker
    reader, decoder = BetonReader(path), Planes()
    gpu = GpuDecoding(reader, decoder)
    gpu.gpu_rate = 1e9
    batches, replacements = stream_of(path, gpu)
    assert list(replacements.unreadable) == [5]
    assert all((6 in d.indices) for plan, d in batches if 5 in plan.indices)
    assert decoder.decoded
    assert reader.photo_bytes(5) not in decoder.decoded


def test_raw_photos_stay_with_the_cpu(raw_beton: Path) -> None:
    decoder = Planes()
    batches, _ = stream_of(raw_beton, GpuDecoding(BetonReader(raw_beton), decoder))
    assert_whole(raw_beton, batches)
    assert not decoder.decoded
    assert choose_decoding("auto", BetonReader(raw_beton), decoder, 2) == (None, "")
    with pytest.raises(ValueError, match=r"--decode gpu: there are no JPEGs; use --decode cpu"):
        choose_decoding("gpu", BetonReader(raw_beton), decoder, 2)


def test_the_share_follows_the_rates(beton: Path) -> None:
    assert gpu_share(300.0, 100.0) == 0.75
    gpu = GpuDecoding(BetonReader(beton), Planes())
    indices = np.arange(8)
    assert not gpu.chosen(indices).any()
    reader = BetonReader(beton)
    for i in range(7):
        pixels = torch.from_numpy(reader.pixels(i).reshape(-1))
        gpu.remember(np.array([i]), pixels, np.zeros(1, np.int64))
    for gpu_rate, cpu_rate, count in ((1, 3, 2), (1, 1, 4), (3, 1, 6), (1e9, 1, 7), (0, 1, 0)):
        gpu.gpu_rate, gpu.cpu_rate = float(gpu_rate), float(cpu_rate)
        assert gpu.chosen(indices).sum() == count, (gpu_rate, cpu_rate)
    gpu.gpu_rate = gpu.cpu_rate = 100.0
    gpu.note_rates(cpu=200.0, gpu=None)
    assert gpu.cpu_rate == pytest.approx(110.0)
    assert gpu.gpu_rate == 100.0


def test_row_means_tell_photos_apart_and_not_decoders(beton: Path) -> None:
    reader, decoder = BetonReader(beton), Decoder()
    ours, theirs = [], []
    for i in range(COUNT):
        sides = int(reader.heights[i]), int(reader.widths[i])
        data = reader.photo_bytes(i)
        (planes,) = Planes()([torch.frombuffer(bytearray(data), dtype=torch.uint8)])
        for means, photo in (
            (ours, decoder.decode(data, *sides)),
            (theirs, planes.permute(1, 2, 0).contiguous().numpy()),
        ):
            pixels = torch.from_numpy(photo.reshape(-1))
            where = np.zeros(1, np.int64), *(np.array([side]) for side in sides)
            means.append(row_means(pixels, *where)[0])
    distance = np.abs(np.array(ours)[:, None] - np.array(theirs)[None]).max(axis=2)
    same = np.eye(COUNT, dtype=bool)
    assert distance[same].max() < 2
    assert distance[~same].min() > 2


@pytest.mark.parametrize(
    ("wish", "good", "gpu_rate", "chosen", "said"),
    [
        (
            "auto",
            64,
            9000.0,
            True,
            r"by the GPU \(9,000 images/s\) and 16 threads \(8,000 images/s",
        ),
        ("auto", 64, 2000.0, False, r"by 16 threads .*: the GPU is slower \(2,000 images/s\)"),
        ("auto", 63, 9000.0, False, "nvJPEG decoded 63 of 64 photos as libjpeg-turbo does"),
        ("gpu", 64, 2000.0, True, "by the GPU"),
        ("gpu", 10, 2000.0, True, "by the GPU"),
    ],
)
def test_auto_wants_a_gpu_that_is_right_and_fast(
    wish: str, good: int, gpu_rate: float, chosen: bool, said: str
) -> None:
    found, why = judged(wish, good, 64, gpu_rate, 8000.0, 16)
    assert found is chosen
    assert re.search(said, why)


def test_the_trial_finds_a_decoder_that_decodes_nothing(beton: Path) -> None:
    class Nothing(Planes):
        def __call__(self, jpegs: list[Tensor]) -> list[Tensor]:
            return [torch.zeros_like(photo) for photo in super().__call__(jpegs)]

    decoding, why = choose_decoding("auto", BetonReader(beton), Nothing(), 2)
    assert decoding is None
    assert "nvJPEG decoded 0 of 48 photos" in why
    with pytest.raises(ValueError, match="--decode gpu: nvJPEG decoded none of 48 JPEGs;"):
        choose_decoding("gpu", BetonReader(beton), Nothing(), 2)
    decoding, why = choose_decoding("gpu", BetonReader(beton), Planes(), 2)
    assert decoding is not None
    assert "by the GPU" in why


def test_without_a_gpu_auto_is_silent_and_gpu_ends_with_a_sentence(beton: Path) -> None:
    plain = build_loader(replace(SMALL, data=str(beton)))
    auto = build_loader(replace(SMALL, data=str(beton), decode="auto"))
    assert auto.reason == plain.reason
    for kind in ("ffcv", "pil"):
        with pytest.raises(ValueError, match=r"^--decode gpu needs an NVIDIA GPU and a CUDA build"):
            build_loader(replace(SMALL, data=str(beton), loader=kind, decode="gpu"))
    assert "needs an NVIDIA GPU" in nvjpeg_problem(torch.device("cpu"))
    with pytest.raises(ValueError, match="--decode tpu: expected one of cpu, gpu, auto"):
        build_loader(replace(SMALL, data=str(beton), decode="tpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nvjpeg_decodes_beside_the_cpu(beton: Path) -> None:
    if problem := nvjpeg_problem(torch.device("cuda")):
        pytest.skip(problem)
    by_both = build_loader(replace(SMALL, data=str(beton), decode="gpu"), "cuda")
    by_cpu = build_loader(replace(SMALL, data=str(beton)), "cuda")
    assert "by the GPU" in by_both.reason
    gpu = by_both._cutter._source._context.gpu_decoding  # type: ignore[attr-defined]
    gpu.gpu_rate = 1e9 * gpu.cpu_rate
    for epoch in range(2):
        for ours, theirs in zip(by_both.epoch(epoch), by_cpu.epoch(epoch), strict=True):
            assert torch.equal(ours.indices, theirs.indices)
            scale = 255 * torch.tensor(SMALL.std, device="cuda").view(3, 1, 1)
            away = ((ours.global_crops - theirs.global_crops) * scale).abs()
            assert float(away.mean(dim=(-3, -2, -1)).max()) < 8
    assert gpu.chosen(np.arange(COUNT)).sum() > COUNT // 2, "nvJPEG did most of them"
    for loader in (by_both, by_cpu):
        loader.close()
