"""Photos that tests make themselves: twenty-two corner cases, and some like a camera's."""

from pathlib import Path

import numpy as np
from PIL import Image
from smooth_photos import smooth_photo

DECODES, UNREADABLE, EITHER, IGNORED = "decodes", "unreadable", "either", "ignored"


def camera_photo(seed: int, width: int = 500, height: int = 375) -> Image.Image:
    """Soft shapes, hard edges and grain, RGB."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(smooth_photo(rng, width, height)).astype(np.int16)
    for _ in range(6):
        x, y = rng.integers(0, width), rng.integers(0, height)
        pixels[y : y + height // 4, x : x + width // 4] += rng.integers(-80, 80, 3, dtype=np.int16)
    grain = rng.integers(-12, 13, pixels.shape, dtype=np.int16)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def camera_photos(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs below `folder`, of a camera's sizes and an encoder's kinds, some gray."""
    sizes = ((500, 375), (375, 500), (500, 333), (640, 480), (256, 256), (120, 90), (1200, 900))
    kinds: tuple[dict[str, object], ...] = (
        *({}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"optimize": True}),
        *({"restart_marker_blocks": 16}, {"subsampling": 1, "icc_profile": b"profile" * 500}),
    )
    paths = []
    for i in range(count):
        photo = camera_photo(i, *sizes[i % len(sizes)])
        paths.append(folder / f"class{i % 3}" / f"{i:03d}.jpg")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        photo = photo.convert("L") if i % 10 == 9 else photo
        photo.save(paths[-1], "JPEG", **kinds[i % len(kinds)])
    return paths


def hard_photos(folder: Path) -> dict[str, str]:
    """Write the corner cases to `folder`; returns what a loader owes for each file name."""
    photo = camera_photo(0, 320, 240)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, which the published recipe ignores
    deep = (np.asarray(photo.convert("L")).astype(np.uint16) * 257).clip(0, 65535)
    photo.save(folder / "plain.jpg")
    photo.convert("L").save(folder / "gray.jpg")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.save(folder / "progressive.jpg", progressive=True)
    photo.save(folder / "subsampling_444.jpg", subsampling=0)
    photo.save(folder / "exif_rotated.jpg", exif=exif)
    photo.save(folder / "png_named.JPEG", "PNG")
    photo.convert("RGBA").save(folder / "rgba.png")
    photo.quantize(64).save(folder / "palette.png")
    photo.save(folder / "photo.webp")
    photo.crop((0, 0, 64, 48)).save(folder / "photo.bmp")
    photo.resize((1, 1)).save(folder / "one_pixel.jpg")
    photo.resize((3, 300)).save(folder / "narrow_3x300.jpg")
    photo.resize((2000, 20)).save(folder / "wide_2000x20.jpg")
    photo.resize((5000, 4000)).save(folder / "large_5000x4000.jpg", quality=50)
    owed = {path.name: DECODES for path in folder.iterdir()}
    Image.fromarray(deep).save(folder / "gray16.png")
    plain = (folder / "plain.jpg").read_bytes()
    garbled = bytearray(plain)
    rng = np.random.default_rng(0)
    for place in rng.integers(len(plain) // 2, len(plain) - 2, 200).tolist():
        if 0xFF not in garbled[place - 1 : place + 1]:  # markers stay, or it would be no JPEG
            garbled[place] = rng.integers(0, 255)
    damaged = {
        "truncated.jpg": (plain[: len(plain) // 2], UNREADABLE),
        "header_only.jpg": (plain[:200], UNREADABLE),
        "empty.jpg": (b"", UNREADABLE),
        "text.jpg": (b"This is no photo.\n" * 20, UNREADABLE),
        "garbled.jpg": (bytes(garbled), EITHER),
        ".hidden.jpg": (plain, IGNORED),
    }
    for name, (content, _) in damaged.items():
        (folder / name).write_bytes(content)
    return owed | {name: expect for name, (_, expect) in damaged.items()} | {"gray16.png": EITHER}
