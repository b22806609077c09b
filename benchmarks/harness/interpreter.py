"""Triton's interpreter, made to run our kernels."""

from collections.abc import Callable
from inspect import getmembers
from typing import Any


def adapt_interpreter(set_to: Callable[[Any, str, Any], None] = setattr) -> None:
    """Triton 3.6's interpreter takes loop bounds in a way that NumPy 2.4 refuses (triton #9171),
    and its time goes into the number of operations, however large their blocks: blocks become
    larger. It also prepares its language anew whenever a function calls another: once is enough.
    `set_to` sets an attribute; a test gives one that it can undo."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    from ibeton.pipeline.crops import gpu_kernels

    patch = interpreter._patch_lang_tensor

    def patch_and_adapt(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch_builtin, builtins = interpreter._patch_builtin, dict[Any, str]()

    def patch_once(package: Any, builder: Any, scope: Any) -> None:
        if package not in builtins:
            names = (name for name, member in getmembers(package) if is_builtin(member))
            builtins[package] = next(names, "__doc__")
        if is_builtin(getattr(package, builtins[package])):  # no longer, once it is patched
            patch_builtin(package, builder, scope)

    set_to(interpreter, "_patch_builtin", patch_once)
    set_to(interpreter, "_patch_lang_tensor", patch_and_adapt)
    set_to(gpu_kernels, "BLOCK_PIXELS", 4096)
    set_to(gpu_kernels, "BLOCK_TAPS", 64)
