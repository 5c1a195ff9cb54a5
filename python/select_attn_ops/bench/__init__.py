"""How fast the operators are, beside what the machine can do: ``python -m select_attn_ops bench``.

Needs torch, which the operators themselves do not; importing select_attn_ops imports none of this.
"""

from .._library import torch

if torch is None:
    raise ImportError("the benchmark needs torch, which cannot be imported: pip install torch")
