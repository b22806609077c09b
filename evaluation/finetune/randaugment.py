"""timm's RandAugment with its random numbers from (seed, epoch, photo) instead of global state.

Operations, strengths and their meaning are timm's. Its own call draws from Python's and NumPy's
global generators: what a photo gets there depends on which thread comes first, and so does what
random erasing draws meanwhile. Nothing here touches those generators once it is built.
"""

from typing import Any

import numpy as np
from PIL import Image

# Operations whose argument timm negates by a coin; for the others around 1 it is the distance to 1.
_AROUND_0 = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel",
             "TranslateYRel")  # fmt: skip
_AROUND_1 = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
_MAX_LEVEL = 10.0


class RandAugment:
    """RandAugment as `spec` says it in timm's spelling, for views of `size` pixels; operations that
    move pixels are bicubic and fill with the mean color. Raises ValueError for another spelling."""

    def __init__(self, spec: str, size: int, mean: tuple[float, ...]) -> None:
        from timm.data.auto_augment import rand_augment_transform  # only here: takes seconds

        fill = tuple(min(255, round(255 * channel)) for channel in mean)
        hparams = {
            "translate_const": int(size * 0.45),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
        }
        try:
            policy = rand_augment_transform(spec, hparams)
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"--augment {spec}: give RandAugment in timm's spelling, as rand-m9-mstd0.5-inc1"
            ) from error
        if policy.choice_weights is not None:
            raise ValueError(f"--augment {spec}: weighted choices (-w) are not supported")
        self._operations, self._layers = policy.ops, policy.num_layers
        # Per level, as these grow in proportion; timm's own functions would toss a global coin.
        self._slopes = {
            operation.name: abs(operation.level_fn(_MAX_LEVEL, operation.hparams)[0] - rest)
            / _MAX_LEVEL
            for operation in self._operations
            for names, rest in ((_AROUND_0, 0.0), (_AROUND_1, 1.0))
            if operation.name in names
        }

    def draw(self, rng: np.random.Generator) -> list[tuple[Any, tuple[Any, ...]]]:
        """The operations to apply, each with its arguments."""
        drawn = []
        for choice in rng.integers(len(self._operations), size=self._layers):
            operation = self._operations[choice]
            if rng.random() < operation.prob:
                drawn.append((operation, self._arguments(operation, rng)))
        return drawn

    def _arguments(self, operation: Any, rng: np.random.Generator) -> tuple[Any, ...]:
        level, spread = float(operation.magnitude), operation.magnitude_std
        if spread == float("inf"):
            level = rng.uniform(0, level)
        elif spread > 0:
            level = rng.normal(level, spread)
        level = max(0.0, min(level, operation.magnitude_max or _MAX_LEVEL))
        if operation.level_fn is None:
            return ()
        if operation.name in self._slopes:
            change = self._slopes[operation.name] * level * (1 if rng.random() < 0.5 else -1)
            return (change if operation.name in _AROUND_0 else max(0.1, 1.0 + change),)
        arguments = operation.level_fn(level, operation.hparams)
        if operation.name.startswith("Posterize"):
            return (max(1, arguments[0]),)  # Pillow refuses 0 bits, which timm asks for at level 10
        return arguments

    def apply(self, view: np.ndarray, rng: np.random.Generator) -> None:
        """Augment a view uint8 [3, S, S] in place."""
        drawn = self.draw(rng)
        if not drawn:
            return
        image = Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))
        for operation, arguments in drawn:
            image = operation.aug_fn(image, *arguments, **operation.kwargs)
        view[:] = np.asarray(image).transpose(2, 0, 1)
