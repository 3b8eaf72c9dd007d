"""Triton's interpreter without what it does again and again: the same results, several times faster."""

from __future__ import annotations

import inspect


def patch_language_once(patch_attribute) -> None:
    """Have a launch put the interpreter's functions into Triton's language once, not at every call of a function.

    Each setting of an attribute also lets Python forget what it knows about the class of all tensors.

    Args:
        patch_attribute: a function of an object, a name and a value, `MonkeyPatch.setattr` say.
    """
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[str] = set()  # modules, in the launch that runs

    def patch_for_launch(executor, *args, **kwargs):
        patched.clear()
        try:
            return launch(executor, *args, **kwargs)
        finally:
            patched.clear()

    def patch_once(function):
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        names = {module.__name__ for module in modules if module in (interpreter.tl, interpreter.tl.core)}
        if names <= patched:
            return None
        patched.update(names)
        return patch(function)

    patch_attribute(interpreter.GridExecutor, "__call__", patch_for_launch)
    patch_attribute(interpreter, "_patch_lang", patch_once)
    patch_attribute(interpreter, "_get_np_dtype", by_name(interpreter._get_np_dtype))


def by_name(dtype_of):
    """The NumPy dtype of a dtype of Triton, looked up once for each name."""
    known = {}

    def find(dtype):
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = dtype_of(dtype)
        return found

    return find
