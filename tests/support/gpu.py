"""What a GPU computes with, in plain PyTorch: a stand-in for its kernels, and one for its attention of packed rows."""

from itertools import pairwise

import torch
from torch.nn import functional


class PlainKernels:
    """kernels.gpu.GpuKernels for what the server asks of it: types and shapes are documented there."""

    name = "plain"
    device = torch.device("cpu")

    def rms_norm(self, x, weight, eps, plus_one):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * (1 + weight.float())).to(x.dtype) if plus_one else weight * normed.to(x.dtype)

    def add_rms_norm(self, x, added, weight, eps, plus_one):
        return x + added, self.rms_norm(x + added, weight, eps, plus_one)

    def silu_times(self, gate, up):
        return functional.silu(gate) * up

    def rotate(self, x, cos, sin, out, back=False):
        first, second = x.chunk(2, -1)
        out.copy_(x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None])

    def decode(self, q, k, v, pool_layer, tables, lens, window, scale, max_keys):
        assert tables.dtype == lens.dtype == torch.int32 and max_keys >= int(lens.max())
        out = torch.zeros_like(q)
        for row, num in enumerate(lens.tolist()):
            if num:
                pool_layer[0][:, tables[row, (num - 1) // 16], (num - 1) % 16] = k[row]
                pool_layer[1][:, tables[row, (num - 1) // 16], (num - 1) % 16] = v[row]
                pages = tables[row, : -(-num // 16)].long()
                seen = slice(max(0, num - window) if window else 0, num)
                keys, values = (side[:, pages].flatten(1, 2)[:, seen] for side in pool_layer)
                kind = {"scale": scale, "enable_gqa": True}
                out[row] = functional.scaled_dot_product_attention(
                    q[row][None, :, None], keys[None], values[None], **kind
                )[0, :, 0]
        return out

    def sample(self, logits, temperature, uniform):
        wide = logits.double() / torch.where(temperature > 0, temperature, 1)[:, None]
        logprobs = torch.log_softmax(wide, -1)
        upto = logprobs.exp().cumsum(-1)
        drawn = torch.searchsorted(upto, (uniform * upto[:, -1])[:, None], right=True)[:, 0]
        token = torch.where(temperature > 0, drawn.clamp(max=logits.shape[1] - 1), wide.argmax(-1))
        ok = torch.isfinite(wide.amax(-1)) & ~torch.isnan(wide).any(-1)
        return token, logprobs.gather(1, token[:, None])[:, 0].float(), ok


def plain_varlen(q, k, v, rows, scale, window=None):
    """kernels.varlen.varlen_attention."""
    out = torch.empty_like(q)
    queries, keys = rows.queries.tolist(), rows.keys.tolist()
    for (first_q, last_q), (first_k, last_k) in zip(pairwise(queries), pairwise(keys), strict=True):
        assert last_q - first_q <= rows.max_queries and last_k - first_k <= rows.max_keys
        at = torch.arange(last_k - first_k - (last_q - first_q), last_k - first_k)[:, None]
        seen = torch.arange(last_k - first_k)[None]
        mask = (seen <= at) & (seen > at - (window or last_k))
        own = (
            x[part].transpose(0, 1)[None]
            for x, part in ((q, slice(first_q, last_q)), (k, slice(first_k, last_k)), (v, slice(first_k, last_k)))
        )
        out[first_q:last_q] = functional.scaled_dot_product_attention(
            *own, attn_mask=mask, scale=scale, enable_gqa=True
        )[0].transpose(0, 1)
    return out
