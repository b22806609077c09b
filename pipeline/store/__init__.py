"""Photos as files: sources, decoding, the .beton format."""

from typing import TYPE_CHECKING

from ibeton.lazy import exports

if TYPE_CHECKING:
    from ibeton.pipeline.store.beton import JPG, RAW, BetonReader
    from ibeton.pipeline.store.beton_writer import BetonWriter
    from ibeton.pipeline.store.decode import (
        UnreadableData,
        UnreadablePhoto,
        decode_photo,
        load_photo,
        to_rgb,
    )
    from ibeton.pipeline.store.jpeg import whole_jpeg_size
    from ibeton.pipeline.store.photos import Photos, is_beton, open_photos
    from ibeton.pipeline.store.sources import Photo, Source, open_source, read_bytes
    from ibeton.pipeline.store.turbojpeg import Decoder

__all__ = [
    "JPG",
    "RAW",
    "BetonReader",
    "BetonWriter",
    "Decoder",
    "Photo",
    "Photos",
    "Source",
    "UnreadableData",
    "UnreadablePhoto",
    "decode_photo",
    "is_beton",
    "load_photo",
    "open_photos",
    "open_source",
    "read_bytes",
    "to_rgb",
    "whole_jpeg_size",
]

__getattr__ = exports(
    __name__,
    {
        "beton": (
            "JPG",
            "RAW",
            "BetonReader",
        ),
        "beton_writer": ("BetonWriter",),
        "decode": (
            "UnreadableData",
            "UnreadablePhoto",
            "decode_photo",
            "load_photo",
            "to_rgb",
        ),
        "jpeg": ("whole_jpeg_size",),
        "photos": (
            "Photos",
            "is_beton",
            "open_photos",
        ),
        "sources": (
            "Photo",
            "Source",
            "open_source",
            "read_bytes",
        ),
        "turbojpeg": ("Decoder",),
    },
)
