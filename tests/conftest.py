"""Puts this folder on the path, for `from paths import ROOT`."""
