"""Parts of the step as autograd functions over the Triton kernels of `model.kernels`. The plain
modules are their references."""
