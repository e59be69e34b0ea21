"""NF4 4-bit weights in plain PyTorch: the specification that every backend is tested against, on any device.

Source: QLoRA, arXiv 2305.14314, section 3; the bits are those of bitsandbytes 0.50 on a CPU. nf4.py checks the inputs, this
module does not. A weight is processed in slabs, so temporaries stay below 64 MB whatever its size.

The format: the weight is flattened row by row and cut into blocks of 64 (a block may cross rows, the last may be shorter).
A block stores absmax = max |x| and, for each element, the index of the code value nearest to x / absmax. Two indices share a
byte, the first in its high half; an odd number of elements is padded with index 7, whose code value is 0."""

import functools
import math

import torch

NAME = "torch"
BLOCK = 64  # elements that share an absmax
NESTED_BLOCK = 256  # absmax values that share a second absmax
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
TINY = 1e-38  # keeps the reciprocal of the absmax of an all-zero block finite


def why_not(device):
    """None: this backend runs on every device."""


def describe():
    """What runs, for a line on the screen."""
    return "plain PyTorch, the specification"


def max_rows(shape, dtype):
    """0: there is no matmul here; every product uses the dequantised weight."""
    return 0


@functools.cache
def tables(device):
    """(code (16,) fp32, midpoints (15,) fp32, pairs (256,) int64). pairs: for each byte the bits of its two fp32 code values."""
    with torch.inference_mode(False):
        code = torch.tensor(CODE, dtype=torch.float32, device="cpu")  # explicit: the default may be meta
        byte = torch.arange(256, device="cpu")
        pairs = torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.int64).view(256)
        return code.to(device), ((code[:-1] + code[1:]) / 2).to(device), pairs.to(device)


@functools.cache
def halves(device):
    """(below (65536,) uint8, split (65536,) fp32). The index is the upper 16 bits of a float, as a signed number plus 32768.
    below: how many midpoints are below all floats with these upper bits; split: the midpoint between them, or infinity."""
    midpoints = tables(torch.device("cpu"))[1]
    with torch.inference_mode(False):
        bits = torch.arange(-32768, 32768, dtype=torch.int32, device="cpu") << 16
        first, last = (b.view(torch.float32) for b in (bits, bits | 0xFFFF))
        below, above = (torch.bucketize(v, midpoints) for v in (torch.minimum(first, last), torch.maximum(first, last)))
        split = torch.where(below < above, midpoints[below.clamp(max=14)], torch.inf)
        return below.to(torch.uint8).to(device), split.to(device)


def nearest(scaled):
    """Indices (n,) uint8 of the code values nearest to scaled (n,) fp32 in [-1, 1]: the number of midpoints below each.
    A tie goes to the lower index, NaN to the highest. The same as torch.bucketize(scaled, midpoints), which takes 20 ns an
    element on one core of an AMD EPYC; this takes 1.9."""
    below, split = halves(scaled.device)
    key = (scaled.view(torch.int32) >> 16).add_(32768).long()
    return look_up(below, key).add_(scaled > look_up(split, key))


def look_up(table, index, out=None):
    """table[index] for vectors. Done as a gather in rows, because torch runs index_select and gather of a vector on one core."""
    rows = math.gcd(index.numel(), 64)
    shape = rows, index.numel() // rows
    out = None if out is None else out.view(shape)
    return torch.gather(table.expand(rows, -1), 1, index.view(shape), out=out).view(-1)


def slab_blocks(device):
    """Blocks in a slab. On a CPU its temporaries fit into the cache; on a GPU it is large enough for a kernel launch."""
    return 1 << 13 if device.type == "cpu" else 1 << 15


def quantize(weight):
    """weight (any shape) fp32, fp16 or bf16 -> (packed (ceil(n / 2),) uint8, absmax (ceil(n / 64),) fp32)."""
    flat = weight.reshape(-1)
    n, full = flat.numel(), flat.numel() // BLOCK * BLOCK
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32, device=flat.device)
    step = slab_blocks(flat.device) * BLOCK
    for start in range(0, full, step):
        stop = min(start + step, full)
        blocks = flat[start:stop].view(-1, BLOCK).float()
        slab = torch.amax(blocks.abs(), dim=1, out=absmax[start // BLOCK : stop // BLOCK])
        # Multiply by the reciprocal, as bitsandbytes does: a division would change one index in four million.
        scaled = blocks * (1 / slab.clamp(min=TINY)).unsqueeze(1)
        index = nearest(scaled.clamp_(-1, 1).view(-1))
        torch.bitwise_or(index[0::2] << 4, index[1::2], out=packed[start // 2 : stop // 2])
    if n > full:  # a shorter last block: there bitsandbytes divides, and stores an absmax that is never 0
        rest = flat[full:].float()
        absmax[-1] = rest.abs().max().clamp(min=TINY)
        index = nearest((rest / absmax[-1]).clamp_(-1, 1))
        if n % 2:
            index = torch.nn.functional.pad(index, (0, 1), value=7)
        packed[full // 2 :] = (index[0::2] << 4) | index[1::2]
    return packed, absmax


def dequantize(packed, absmax, out):
    """Write code * absmax, a product in fp32 rounded once, into `out` (any shape, contiguous; fp32, fp16 or bf16)."""
    pairs = tables(packed.device)[2]
    flat = out.view(-1)
    n, full = flat.numel(), flat.numel() // BLOCK * BLOCK
    step = min(slab_blocks(packed.device), max(full // BLOCK, 1)) * BLOCK // 2  # bytes
    index, values = torch.empty(2, step, dtype=torch.int64, device=packed.device)
    for start in range(0, full // 2, step):
        stop = min(start + step, full // 2)
        size = stop - start
        index[:size].copy_(packed[start:stop])
        blocks = look_up(pairs, index[:size], out=values[:size]).view(torch.float32).view(-1, BLOCK)
        blocks *= absmax[start * 2 // BLOCK : stop * 2 // BLOCK].unsqueeze(1)
        flat[start * 2 : stop * 2].view(-1, BLOCK).copy_(blocks)
    if n > full:
        rest = look_up(pairs, packed[full // 2 :].long()).view(torch.float32)[: n - full]
        flat[full:] = rest * absmax[-1]
    return out


@functools.cache
def dynamic_map(device):
    """(256,) fp32, rising: the signed dynamic 8-bit code of arXiv 1511.04561. Seven decades, 1 to 64 steps in each."""
    with torch.inference_mode(False):
        values = [0.0, 1.0]
        for decade in range(7):
            edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
            means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
            values += means.tolist() + (-means).tolist()
        return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def double_quantize(absmax):
    """absmax (m,) fp32 -> (q (m,) uint8, absmax2 (ceil(m / 256),) fp32, code2 (256,) fp32, offset () fp32).

    offset is the mean; q is the index of the entry of code2 nearest to (absmax - offset) / absmax2. As in bitsandbytes on a CPU
    the quotient is first rounded to one of 65,536 even steps, which moves about one index in six hundred to its neighbour."""
    code2, offset = dynamic_map(absmax.device), absmax.mean()
    centred = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax2 = centred.abs().amax(dim=1)
    scaled = (centred * (1 / absmax2).unsqueeze(1)).view(-1)[: absmax.numel()].clamp_(-1, 1)
    scaled.nan_to_num_(nan=-1)  # 0 * inf, if all values of a block equal the mean: bitsandbytes stores index 0
    steps = ((scaled + 1) * 0.5 * 65535 + 0.5).int()
    q = torch.bucketize(-1 + 2 * steps.float() / 65535, (code2[:-1] + code2[1:]) * 0.5).to(torch.uint8)
    return q, absmax2, code2.clone(), offset  # a copy: each layer owns its code2


def double_dequantize(q, absmax2, code2, offset):
    """absmax (m,) fp32 = code2[q] * absmax2 + offset, rounded after the product and after the sum."""
    scale = absmax2.repeat_interleave(NESTED_BLOCK)[: q.numel()]
    return look_up(code2, q.long()).mul_(scale).add_(offset)
