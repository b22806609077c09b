"""Photos as files: sources, decoding, the .beton format."""
