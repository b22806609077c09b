"""Photos from a folder or tar -> one .beton file."""

from ibeton.pipeline.convert.converter import ConversionReport, ConvertOptions, convert
from ibeton.pipeline.convert.verify import verify_existing

__all__ = ["ConversionReport", "ConvertOptions", "convert", "verify_existing"]
