"""Makes vLLM's CPU build take the model runner V2, whose Triton kernels then run in Triton's interpreter.

The wheels of Triton have no backend for CPUs. Without one vLLM takes Triton for missing, and the older runner.
"""

import os


def start() -> None:
    """Prepare a process that has imported neither Triton nor vLLM; this module imports neither."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)  # it is the default where there is Triton
    from triton.backends import Backend, backends

    class Driver:
        """vLLM counts the drivers that are active, and this one in any case."""

        @staticmethod
        def is_active() -> bool:
            return False

    backends["cpu"] = Backend(None, Driver)
