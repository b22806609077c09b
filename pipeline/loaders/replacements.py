"""A photo that cannot be decoded is named, counted, and another takes its place."""

import logging
import threading

import numpy as np

from ibeton.pipeline.crops.cpu import cut_views
from ibeton.pipeline.sampling.draws import ViewSpec, draw_views
from ibeton.pipeline.store.decode import UnreadableData, UnreadablePhoto
from ibeton.pipeline.store.photos import Photos

log = logging.getLogger(__name__)

_MOST_IN_A_ROW = 100  # so many bad neighbors mean a bad data set, not a bad photo


class Replacements:
    """Decodes photos again that a fast decoder refused, and lists the unreadable ones. Methods may
    be called from any thread.

    The replacement depends only on the sample index, so it is the same for every loader, batch size
    and worker count. `quiet`: of a worker process, whose list the main process reports.
    """

    def __init__(
        self, photos: Photos, views: list[ViewSpec], seed: int, quiet: bool = False
    ) -> None:
        self._photos = photos
        self._views = views
        self._seed = seed
        self._quiet = quiet
        self.unreadable: dict[int, str] = {}  # index -> name and reason
        self._noting = threading.Lock()

    def readable(self, index: int) -> tuple[int, np.ndarray]:
        """The first photo from `index` on that decodes: its index and its pixels uint8 [H, W, 3].

        Raises UnreadableData after a hundred bad ones in a row.
        """
        for offset in range(min(_MOST_IN_A_ROW, len(self._photos))):
            candidate = (index + offset) % len(self._photos)
            try:
                return candidate, self._photos.pixels(candidate)
            except UnreadablePhoto as reason:
                self.note(candidate, f"{self._photos.name(candidate)}: {reason}")
        count = min(_MOST_IN_A_ROW, len(self._photos))
        raise UnreadableData(
            f"{count} photos in a row cannot be read, from {self._photos.name(index)} on"
            f" ({self.unreadable[index].rpartition(': ')[2]}); check the data set"
        )

    def note(self, index: int, name_and_reason: str) -> None:
        """Add an unreadable photo to the list, and log it once."""
        with self._noting:
            known = index in self.unreadable
            self.unreadable.setdefault(index, name_and_reason)
        if not known and not self._quiet:
            log.warning("unreadable photo, replaced by the next one: %s", name_and_reason)

    def fill(self, index: int, epoch: int, global_out: np.ndarray, local_out: np.ndarray) -> int:
        """Cut the views of `index`, or of its replacement; returns the index used."""
        used, pixels = self.readable(index)
        height, width = pixels.shape[:2]
        draws = draw_views(self._views, self._seed, epoch, index, height, width)
        cut_views(pixels, draws, global_out, local_out)
        return used
