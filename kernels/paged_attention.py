"""paged_attention in Triton: attention's forward kernel, which looks each key's page up."""

from typing import Any

import torch

from . import attention


def forward(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, pages: Any, options: Any
) -> Any:
    """y (B, H, T, Dv), and lse (B, H, T) with options.return_lse; pages (P, G, L, D)."""
    table = pages.table.contiguous()
    place = {
        "pages": k_pages.shape[0],
        "page_table": table,
        "table_stride": table.stride(0),
        "page_length": k_pages.shape[2],
    }
    keys = table.shape[1] * k_pages.shape[2]
    return attention.forward(q, k_pages, v_pages, pages.extra, options, keys=keys, place=place)
