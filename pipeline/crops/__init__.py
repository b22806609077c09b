"""Pixels and draws -> finished views: compiled, by Pillow (the reference), on a GPU."""
