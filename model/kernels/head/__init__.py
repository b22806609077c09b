"""Kernels of the projection head and of the loss."""
