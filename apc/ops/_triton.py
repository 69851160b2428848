"""Triton for the modules that define kernels, or a stand-in where it is not installed.

With the stand-in, `apc.ops` can be imported and runs on the CPU. Launching a kernel raises UserError.
"""

from apc.utils.errors import UserError

__all__ = [
    "TensorDescriptor",
    "gdc_launch_dependents",
    "gdc_wait",
    "get_cache_manager",
    "tl",
    "triton",
    "triton_driver",
]
_ADVICE = "Triton is not installed, and this needs it: pip install triton, or use the CPU or kernel=torch"


class _Missing:
    """Stands in for Triton's modules and for kernels: kernels can be defined, any other use raises UserError."""

    constexpr = object

    def jit(self, kernel=None, **options):
        return self.jit if kernel is None else self

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError(_ADVICE)

    def __getitem__(self, grid):
        raise UserError(_ADVICE)


try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.runtime import driver as triton_driver
    from triton.runtime.cache import get_cache_manager
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "triton":
        raise
    triton = tl = triton_driver = TensorDescriptor = get_cache_manager = gdc_launch_dependents = gdc_wait = _Missing()
