"""Settings of the data side: one dataclass, from which the command line is made too."""

from dataclasses import dataclass, replace

from ibeton.options import flag, option
from ibeton.pipeline.loaders.kinds import LOADERS
from ibeton.pipeline.sampling.draws import ViewSpec, published_views

CROPS_ON = ("auto", "gpu", "cpu")


@dataclass
class PipelineConfig:
    """What to read, how to cut it, what to mask. Defaults are the published ViT-S/16 recipe."""

    data: str = option("", ".beton file or photo folder to train on")
    loader: str = option(
        "auto",
        f"{', '.join(f'{kind.name} ({kind.about})' for kind in LOADERS.values())}, or auto",
        ("auto", *LOADERS),
    )
    crops_on: str = option(
        "auto",
        "where views are cut: on the GPU, beside the step, or by the loader's workers, which leaves"
        " the GPU to the step where cores are many (auto: on the GPU, where there is one)",
        CROPS_ON,
    )
    batch_size: int = option(64, "images a step in each process")
    workers: int = option(0, "loader threads or processes in each process (0: the cores at hand)")
    seed: int = option(0, "seed of order, crops, masks and weights")
    global_crops_number: int = option(2, "global views an image")
    local_crops_number: int = option(10, "local views an image")
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
    pred_ratio: tuple[float, ...] = option((0.0, 0.3), "mask ratios, one is chosen a view")
    pred_ratio_var: tuple[float, ...] = option((0.0, 0.2), "half-width of the range of each ratio")
    pred_start_epoch: int = option(0, "epoch from which views are masked")
    mean: tuple[float, ...] = option((0.485, 0.456, 0.406), "channel means on 0..1")
    std: tuple[float, ...] = option((0.229, 0.224, 0.225), "channel standard deviations on 0..1")
    batches_ahead: int = option(2, "batches made ready before they are asked for")

    def views(self) -> list[ViewSpec]:
        """The views an image is cut into, global ones first."""
        brightness, contrast, saturation, hue = self.color_jitter
        views = published_views(
            self.global_crops_number,
            self.local_crops_number,
            self.global_crops_size,
            self.local_crops_size,
            self.global_crops_scale,
            self.local_crops_scale,
            self.blur_radius,
        )
        return [
            replace(
                view,
                brightness=brightness,
                contrast=contrast,
                saturation=saturation,
                hue=hue,
                gray_p=self.gray_p,
            )
            for view in views
        ]

    def check(self) -> None:
        """Raise ValueError, naming the option, for values that cannot work."""
        if not self.data:
            raise ValueError("--data is missing: give a .beton file or a folder of photos")
        if self.loader not in ("auto", *LOADERS):
            raise ValueError(f"--loader {self.loader}: expected auto, {', '.join(LOADERS)}")
        if self.crops_on not in CROPS_ON:
            raise ValueError(f"--crops-on {self.crops_on}: expected one of {', '.join(CROPS_ON)}")
        at_least = {
            "batch_size": 1,
            "workers": 0,
            "seed": 0,
            "global_crops_number": 1,
            "local_crops_number": 0,
            "patch_size": 1,
            "batches_ahead": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{flag(name)} must be at least {least}")
        for name in ("global_crops_size", "local_crops_size"):
            size = getattr(self, name)
            if size < self.patch_size or size % self.patch_size:
                raise ValueError(
                    f"{flag(name)} {size} is not a multiple of --patch-size {self.patch_size}"
                )
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{flag(name)} {low} {high}: expected 0 < from <= to <= 1")
        low, high = self.blur_radius
        if not 0 <= low <= high:
            raise ValueError(f"--blur-radius {low} {high}: expected 0 <= from <= to")
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise ValueError("--color-jitter: strengths are at least 0, that of hue at most 0.5")
        if not 0 <= self.gray_p <= 1:
            raise ValueError(f"--gray-p {self.gray_p}: expected a share, 0 to 1")
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError("--mean and --std take three values each, and --std positive ones")
        if not all(0 <= value <= 1 for value in (*self.mean, *self.std)):
            raise ValueError(
                "--mean and --std are on the scale 0..1: divide values on 0..255 by 255"
            )
