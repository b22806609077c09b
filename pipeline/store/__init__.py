"""Photos as files: sources, decoding, the .beton format."""

from ibeton.pipeline.store.beton import JPG as JPG
from ibeton.pipeline.store.beton import BetonReader as BetonReader
from ibeton.pipeline.store.decode import UnreadableData as UnreadableData
from ibeton.pipeline.store.decode import UnreadablePhoto as UnreadablePhoto
from ibeton.pipeline.store.decode import decode_photo as decode_photo
from ibeton.pipeline.store.jpeg import whole_jpeg_size as whole_jpeg_size
from ibeton.pipeline.store.photos import Photos as Photos
from ibeton.pipeline.store.photos import is_beton as is_beton
from ibeton.pipeline.store.sources import Photo as Photo
from ibeton.pipeline.store.sources import open_source as open_source
from ibeton.pipeline.store.sources import read_bytes as read_bytes
from ibeton.pipeline.store.turbojpeg import Decoder as Decoder
