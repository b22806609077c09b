"""Settings of the data side: one dataclass, from which the command line is made too."""

from collections.abc import Iterator
from dataclasses import dataclass

from ibeton.options import flag, option, refuse, too_low, unknown_choices
from ibeton.pipeline.loaders.kinds import LOADERS
from ibeton.pipeline.sampling.draws import ViewSpec, published_views
from ibeton.pipeline.sampling.rng import MOST_VIEWS

_AT_LEAST: dict[tuple[str, ...], float] = {
    ("batch_size", "global_crops_number", "patch_size", "batches_ahead"): 1,
    ("workers", "seed", "local_crops_number"): 0,
}


@dataclass
class PipelineConfig:
    """What to read, how to cut it, what to mask. Defaults are the published ViT-S/16 recipe."""

    data: tuple[str, ...] = option(
        (), ".beton files, photo folders or tars to train on: one or several", path=True
    )
    loader: str = option(
        "auto",
        f"{', '.join(f'{kind.name} ({kind.about})' for kind in LOADERS.values())}, or auto",
        ("auto", *LOADERS),
    )
    crops_on: str = option(
        "auto",
        "where views are cut: on the GPU, beside the step, or by the loader's workers, which leaves"
        " the GPU to the step where cores are many (auto: on the GPU, where there is one)",
        ("auto", "gpu", "cpu"),
    )
    decode: str = option(
        "cpu",
        "where JPEGs are decoded: on the CPU, with Pillow's pixels; by GPU and CPU together, where"
        " views are cut on the GPU: faster where cores are few, pixels differ a little; auto: on"
        " the GPU too if that is the faster of the two (dali: where views are cut)",
        ("cpu", "gpu", "auto"),
    )
    batch_size: int = option(64, "images per step in each process")
    workers: int = option(0, "loader threads or processes in each process (0: all cores)")
    seed: int = option(0, "seed of order, crops, masks and weights")
    global_crops_number: int = option(2, "global views per image")
    local_crops_number: int = option(10, "local views per image")
    global_crops_size: int = option(224, "side of a global view in pixels")
    local_crops_size: int = option(96, "side of a local view in pixels")
    global_crops_scale: tuple[float, float] = option((0.25, 1.0), "area of global views, from to")
    local_crops_scale: tuple[float, float] = option((0.05, 0.25), "area of local views, from to")
    blur_radius: tuple[float, float] = option((0.1, 2.0), "Gaussian blur radius in pixels, from to")
    color_jitter: tuple[float, float, float, float] = option(
        (0.4, 0.4, 0.2, 0.1), "strength of brightness, contrast, saturation, hue"
    )
    gray_p: float = option(0.2, "share of views turned gray")
    patch_size: int = option(16, "side of a patch in pixels")
    pred_shape: str = option("block", "shape of the masks", ("block", "rand"))
    pred_ratio: tuple[float, ...] = option((0.0, 0.3), "mask ratios, one is chosen per view")
    pred_ratio_var: tuple[float, ...] = option((0.0, 0.2), "half-width of the range of each ratio")
    pred_start_epoch: int = option(0, "epoch from which views are masked")
    mean: tuple[float, ...] = option((0.485, 0.456, 0.406), "channel means on 0..1")
    std: tuple[float, ...] = option((0.229, 0.224, 0.225), "channel standard deviations on 0..1")
    batches_ahead: int = option(2, "batches made ready before they are asked for")

    def __post_init__(self) -> None:
        if isinstance(self.data, str):  # as older runs and callers with one source have it
            self.data = (self.data,) if self.data else ()

    def views(self) -> list[ViewSpec]:
        """The views that each image is cut into, global ones first."""
        brightness, contrast, saturation, hue = self.color_jitter
        return published_views(
            self.global_crops_number,
            self.local_crops_number,
            self.global_crops_size,
            self.local_crops_size,
            self.global_crops_scale,
            self.local_crops_scale,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            gray_p=self.gray_p,
            blur_radius=self.blur_radius,
        )

    def check(self) -> None:
        """Raise ValueError, naming every option whose value cannot work."""
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """A sentence per value that cannot work, naming the option."""
        if not self.data:
            yield "--data is missing: give a .beton file or a folder of photos"
        yield from unknown_choices(self)
        yield from too_low(self, _AT_LEAST)
        if self.global_crops_number + self.local_crops_number > MOST_VIEWS:
            yield (
                f"--global-crops-number {self.global_crops_number} and --local-crops-number"
                f" {self.local_crops_number}: expected at most {MOST_VIEWS} views together"
            )
        if self.seed >= 2**64:
            yield f"--seed {self.seed} must be below 2^64"
        for name in ("global_crops_size", "local_crops_size"):
            size = getattr(self, name)
            if self.patch_size > 0 and (size < self.patch_size or size % self.patch_size):
                yield f"{flag(name)} {size} is not a multiple of --patch-size {self.patch_size}"
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                yield f"{flag(name)} {low} {high}: expected 0 < from <= to <= 1"
        low, high = self.blur_radius
        if not 0 <= low <= high:
            yield f"--blur-radius {low} {high}: expected 0 <= from <= to"
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            yield "--color-jitter: strengths are at least 0, that of hue at most 0.5"
        if not 0 <= self.gray_p <= 1:
            yield f"--gray-p {self.gray_p}: expected a share, 0 to 1"
        yield from self._normalization_problems()

    def _normalization_problems(self) -> Iterator[str]:
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            yield "--mean and --std take three values each, and --std positive ones"
        elif min(self.mean) < 0 or max(*self.mean, *self.std) > 1:
            values = " ".join(f"{value / 255:.3f}" for value in self.mean)
            hint = f": divide by 255, --mean {values}" if max(self.mean) > 1 else ""
            yield f"--mean and --std are of pixels on 0 to 1{hint}"
