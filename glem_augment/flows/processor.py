"""Which of torch's elementwise functions this processor computes fast."""

from __future__ import annotations

from functools import cache

import torch


@cache
def mkl_is_fast() -> bool:
    """Whether torch's exp and tanh are at their best here: they are MKL's, which is made for Intel's processors.

    There they take two thirds to four fifths of the time of exp2 and sigmoid, which torch has from elsewhere. On an AMD
    EPYC exp takes twice the time of exp2, and tanh ten times a sigmoid's (benchmarks/elementwise.py); so on all others,
    and where torch cannot name the processor.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.backends.mkl.is_available() and str(capabilities.get("cpu_name")).startswith("Intel")
