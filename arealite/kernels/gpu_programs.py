"""The programs of gpu.py, in Triton: what one block of threads computes.

Arithmetic is float32, rounded where Hugging Face's modules round. A row's result has the same bits whatever rows are
beside it. Offsets that may pass 2**31 are int64.
"""

import triton
import triton.language as tl

PAGE = tl.constexpr(16)  # tokens of a page of the pool


@triton.jit
def _rounded(x, like):
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _places(rows, inner, outer_step, inner_step):
    """Where rows [outer, inner] begin."""
    return (rows // inner).to(tl.int64)[:, None] * outer_step + (rows % inner).to(tl.int64)[:, None] * inner_step


@triton.jit(do_not_specialize=["inner", "num"])
def norm_rows(x, added, weight, out, summed, outer_step, inner_step, inner, num, n, eps,
              PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Of x, or of x + `added`, which is kept in `summed`: these lie as the result does."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    real = (rows < num)[:, None] & (column < n)
    target = rows.to(tl.int64)[:, None] * n + column
    value = tl.load(x + _places(rows, inner, outer_step, inner_step) + column, mask=real, other=0.0).to(tl.float32)
    if added is not None:
        value = _rounded(value + tl.load(added + target, mask=real, other=0.0).to(tl.float32), x)
        tl.store(summed + target, value.to(summed.dtype.element_ty), mask=real)
    value *= tl.rsqrt(tl.sum(value * value, 1) / n + eps)[:, None]
    factor = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32)
    result = value * (1 + factor) if PLUS_ONE else _rounded(value, x) * factor
    tl.store(out + target, result.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["inner", "num"])
def norm_grad_rows(x, weight, grad, by_x, sums, outer_step, inner_step, grad_outer, grad_inner, inner, num, n, eps,
                   PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Each program computes every NUM_SUMS-th block of rows, and its own part of the weight's gradient."""
    column = tl.arange(0, WIDTH)[None, :]
    factor = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32)
    if PLUS_ONE:
        factor += 1
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, num, tl.num_programs(0) * ROWS, num_stages=2):
        rows = first + tl.arange(0, ROWS)
        real = (rows < num)[:, None] & (column < n)
        value = tl.load(x + _places(rows, inner, outer_step, inner_step) + column, mask=real, other=0.0).to(tl.float32)
        above = tl.load(grad + _places(rows, inner, grad_outer, grad_inner) + column, mask=real, other=0.0)
        above = above.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / n + eps)[:, None]
        value *= scale
        total += above * (value if PLUS_ONE else _rounded(value, x))
        through = above * factor
        slope = (through - value * (tl.sum(through * value, 1) / n)[:, None]) * scale
        tl.store(by_x + rows.to(tl.int64)[:, None] * n + column, slope.to(by_x.dtype.element_ty), mask=real)
    own = tl.sum(total, 0)[None, :]
    tl.store(sums + tl.program_id(0) * n + column, own, mask=column < n)


@triton.jit
def gate_rows(gate, up, out, gate_step, up_step, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gate + row * gate_step + column, mask=column < n, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_step + column, mask=column < n, other=0.0).to(tl.float32)
    result = _rounded(value * tl.sigmoid(value), gate) * factor
    tl.store(out + row * n + column, result.to(out.dtype.element_ty), mask=column < n)


@triton.jit
def gate_grad_rows(gate, up, grad, by_gate, by_up, gate_step, up_step, grad_step, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < n
    value = tl.load(gate + row * gate_step + column, mask=real, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_step + column, mask=real, other=0.0).to(tl.float32)
    above = tl.load(grad + row * grad_step + column, mask=real, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(value)
    slope = above * factor * (sigmoid * (1 + value * (1 - sigmoid)))
    tl.store(by_up + row * n + column, (above * _rounded(value * sigmoid, gate)).to(by_up.dtype.element_ty), mask=real)
    tl.store(by_gate + row * n + column, slope.to(by_gate.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["num"])
def rotate_rows(x, cos, sin, out, head_step, token_step, out_head, out_token, heads, num, half,
                BACK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """A row is a head of a token, of which a program reads both halves before it writes either: `out` may be x."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    real = (rows < num)[:, None] & (column < half)
    source = x + _places(rows, heads, token_step, head_step) + column
    target = out + _places(rows, heads, out_token, out_head) + column
    angle = (rows // heads).to(tl.int64)[:, None] * 2 * half + column
    a = tl.load(source, mask=real, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=real, other=0.0).to(tl.float32)
    cos_a = tl.load(cos + angle, mask=real, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + half, mask=real, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=real, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + half, mask=real, other=0.0).to(tl.float32)
    to_a = b * sin_b if BACK else -b * sin_a
    to_b = -a * sin_a if BACK else a * sin_b
    new_a = _rounded(a * cos_a, x) + _rounded(to_a, x)
    new_b = _rounded(b * cos_b, x) + _rounded(to_b, x)
    tl.store(target, new_a.to(out.dtype.element_ty), mask=real)
    tl.store(target + half, new_b.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["first"])
def score_rows(logits, edges, targets, logsum, entropy, logp, vocab, first, inverse_t, BLOCK: tl.constexpr):
    """One row in one pass: sums of exp(z - peak), and of these times z - peak, by column of the block."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * vocab
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for at in range(0, vocab, BLOCK):
        column = at + tl.arange(0, BLOCK)
        z = tl.load(base + column, mask=column < vocab, other=float("-inf")).to(tl.float32) * inverse_t
        top = tl.maximum(peak, z)
        drop = tl.where(peak == float("-inf"), 0.0, peak - top)
        rise = tl.where(z == float("-inf"), 0.0, z - top)
        own = tl.where(z == float("-inf"), 0.0, tl.exp(rise))
        fall = tl.exp(drop)
        dot = fall * (dot + total * drop) + own * rise
        total = total * fall + own
        peak = top
    best = tl.max(peak, 0)
    drop = tl.where(peak == float("-inf"), 0.0, peak - best)
    share = tl.where(peak == float("-inf"), 0.0, tl.exp(drop))
    whole = tl.sum(total * share, 0)
    log_whole = tl.log(whole)
    tl.store(logsum + first + row, log_whole + best)
    tl.store(entropy + first + row, log_whole - tl.sum(share * (dot + total * drop), 0) / whole)
    for i in range(tl.load(edges + first + row), tl.load(edges + first + row + 1)):
        z = tl.load(base + tl.load(targets + i)).to(tl.float32) * inverse_t
        tl.store(logp + i, z - best - log_whole)


@triton.jit(do_not_specialize=["first"])
def score_grad_rows(logits, out, edges, targets, logsum, entropy, logp_grad, entropy_grad, width, first, inverse_t,
                    BLOCK: tl.constexpr):  # fmt: skip
    """dL/dz_j = sum of the gradients of target j - p_j (sum of all targets' gradients + dL/dH (log p_j + H))"""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * width + column
    z = tl.load(logits + at, mask=column < width, other=float("-inf")).to(tl.float32) * inverse_t
    logp = z - tl.load(logsum + first + row)
    asked = 0.0
    hit = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(edges + first + row), tl.load(edges + first + row + 1)):
        above = tl.load(logp_grad + i)
        asked += above
        hit += tl.where(column == tl.load(targets + i), above, 0.0)
    slope = tl.load(entropy_grad + first + row)
    # Not 0 * -inf; a logit that is no number stays none, by its probability.
    through = asked + slope * (tl.maximum(logp, -104.0) + tl.load(entropy + first + row))
    result = (hit - tl.exp(logp) * through) * inverse_t
    tl.store(out + at, result.to(out.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["splits"])
def decode_splits(q, k, v, pool, tables, lens, sums, stats, q_row, q_head, k_row, k_head, v_row, v_head,
                  pool_values, pool_head, table_row, scale, window, heads, splits,
                  GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
                  KEYS: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """One row, one key head, SPLIT keys: the bounds depend on nothing but the row's own length. The program
    that sees the newest key and value stores them in their page first. The last split takes what is left."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens + row)  # with the newest key; 0 for padding
    first = 0
    if window > 0:
        first = tl.maximum(length - window, 0)
    begin = tl.maximum(split * SPLIT, first // KEYS * KEYS)
    end = tl.minimum((split + 1) * SPLIT, length)
    if split == splits - 1:
        end = length
    member, column = tl.arange(0, GROUP_ROWS), tl.arange(0, WIDTH)
    head, is_column = kv_head * GROUP + member, column < DIM
    spot = (row * heads + head) * splits + split
    peak = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    acc = tl.zeros([GROUP_ROWS, WIDTH], tl.float32)
    if begin < end:
        real = (member < GROUP)[:, None] & is_column[None, :]
        queries = tl.load(q + row * q_row + head[:, None] * q_head + column[None, :], mask=real, other=0.0)
        keys_of_head = pool + kv_head.to(tl.int64) * pool_head
        if end == length:
            last = length - 1
            page = tl.load(tables + row * table_row + last // PAGE).to(tl.int64)
            cell = (page * PAGE + last % PAGE) * DIM + column
            new_key = tl.load(k + row * k_row + kv_head * k_head + column, mask=is_column)
            new_value = tl.load(v + row * v_row + kv_head * v_head + column, mask=is_column)
            tl.store(keys_of_head + cell, new_key, mask=is_column)
            tl.store(keys_of_head + pool_values + cell, new_value, mask=is_column)
            tl.debug_barrier()  # other threads of this program read it
        for at in range(begin, end, KEYS):
            place = at + tl.arange(0, KEYS)
            seen = (place < end) & (place >= first)
            page = tl.load(tables + row * table_row + place // PAGE, mask=seen, other=0).to(tl.int64)
            cell = ((page * PAGE + place % PAGE) * DIM)[:, None] + column[None, :]
            wanted = seen[:, None] & is_column[None, :]
            keys = tl.load(keys_of_head + cell, mask=wanted, other=0.0)
            values = tl.load(keys_of_head + pool_values + cell, mask=wanted, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            top = tl.maximum(peak, tl.max(scores, 1))
            fall = tl.exp(peak - top)
            weights = tl.exp(scores - top[:, None])
            total = total * fall + tl.sum(weights, 1)
            acc = acc * fall[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            peak = top
        tl.store(sums + spot[:, None].to(tl.int64) * DIM + column[None, :], acc, mask=real)
    tl.store(stats + spot * 2, peak, mask=member < GROUP)
    tl.store(stats + spot * 2 + 1, total, mask=member < GROUP)


@triton.jit(do_not_specialize=["splits"])
def decode_join(sums, stats, out, splits, DIM: tl.constexpr, WIDTH: tl.constexpr, JOINED: tl.constexpr):
    """The splits of one query head together, JOINED at a time, so that the order of the sum does not depend on how many
    other rows have; zeros for a row without keys."""
    spot = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    top = float("-inf")
    for at in range(0, splits, JOINED):
        split = at + tl.arange(0, JOINED)
        peak = tl.load(stats + (spot * splits + split) * 2, mask=split < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(peak, 0))
    whole = 0.0
    mixed = tl.zeros([WIDTH], tl.float32)
    for at in range(0, splits, JOINED):
        split = at + tl.arange(0, JOINED)
        peak = tl.load(stats + (spot * splits + split) * 2, mask=split < splits, other=float("-inf"))
        total = tl.load(stats + (spot * splits + split) * 2 + 1, mask=split < splits, other=0.0)
        share = tl.where(total > 0, tl.exp(peak - top), 0.0)
        wanted = (total > 0)[:, None] & (column < DIM)[None, :]
        acc = tl.load(sums + (spot * splits + split)[:, None] * DIM + column[None, :], mask=wanted, other=0.0)
        whole += tl.sum(share * total, 0)
        mixed += tl.sum(acc * share[:, None], 0)
    mixed = mixed / tl.where(whole > 0, whole, 1.0)
    tl.store(out + spot * DIM + column, mixed.to(out.dtype.element_ty), mask=column < DIM)


@triton.jit
def _scores(logits, temperature, row, column, vocab):
    """Logits / temperature of some columns of a row; -inf past its end."""
    t = tl.load(temperature + row)
    z = tl.load(logits + row.to(tl.int64) * vocab + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    return z * (1 / tl.where(t > 0, t, 1.0))


@triton.jit
def sample_blocks(logits, temperature, peaks, sums, bests, vocab, blocks, BLOCK: tl.constexpr):
    """Of a block of a row: the largest score, where it is, and the weight relative to it (no number where a score is
    none, or infinite)."""
    row, block = tl.program_id(0), tl.program_id(1)
    z = _scores(logits, temperature, row, block * BLOCK + tl.arange(0, BLOCK), vocab)
    top = tl.max(z, 0)
    at = row * blocks + block
    tl.store(peaks + at, top)
    tl.store(sums + at, tl.sum(tl.exp(z - tl.where(top == float("-inf"), 0.0, top)), 0))
    tl.store(bests + at, block * BLOCK + tl.argmax(z, 0))


@triton.jit
def sample_rows(logits, temperature, uniform, peaks, sums, bests, token, logprob, ok, vocab, blocks,
                BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """The inverse of the cumulative weight: the block that holds the uniform number, then the token in it."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    peak = tl.load(peaks + row * blocks + block, mask=block < blocks, other=float("-inf"))
    mass = tl.load(sums + row * blocks + block, mask=block < blocks, other=0.0)
    top = tl.max(peak, 0)
    share = (mass * tl.exp(peak - top)).to(tl.float64)
    whole = tl.sum(share, 0)
    aim = tl.load(uniform + row) * whole
    # Rounding may leave the aim past the end: the last block, and the last token in it, that have weight are meant.
    chosen = tl.sum((tl.cumsum(share, 0) <= aim).to(tl.int32), 0)
    chosen = tl.minimum(chosen, tl.max(tl.where(share > 0, block, 0), 0))
    left = aim - tl.sum(tl.where(block < chosen, share, 0.0), 0)
    place = tl.arange(0, BLOCK)
    weight = tl.exp(_scores(logits, temperature, row, chosen * BLOCK + place, vocab) - top).to(tl.float64)
    drawn = tl.sum((tl.cumsum(weight, 0) <= left).to(tl.int32), 0)
    drawn = chosen * BLOCK + tl.minimum(drawn, tl.max(tl.where(weight > 0, place, 0), 0))
    best = tl.load(bests + row * blocks + tl.argmax(peak, 0))
    pick = tl.minimum(tl.where(tl.load(temperature + row) > 0, drawn, best), vocab - 1)
    score = _scores(logits, temperature, row, pick, vocab)
    tl.store(token + row, pick.to(tl.int64))
    tl.store(logprob + row, score - top - tl.log(whole.to(tl.float32)))
    tl.store(ok + row, (whole > 0) & (whole < float("inf")))
