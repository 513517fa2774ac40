"""Calls of each of our kernels with small inputs, in memory that begins at an address of the caller's choice."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BYTES = 1 << 25
THREADS = 2
FLOAT32, BFLOAT16, FLOAT16, INT8, NESTED4, NESTED8, NESTED3 = range(7)


@dataclass
class Call:
    """`function` with whole numbers, some of them addresses, and a float at the place `float_at` among them, if any."""

    function: str
    case: str
    numbers: tuple[int, ...]
    outputs: list[Array] = field(default_factory=list)
    float_at: int | None = None
    number: float = 0.0


class Memory:
    """BYTES from `address` on, handed out piece by piece; and random numbers to fill them with."""

    def __init__(self, address: int) -> None:
        self.all = np.ctypeslib.as_array((ctypes.c_uint8 * BYTES).from_address(address))
        self.random = np.random.default_rng(0)
        self._used = 0
        self._address = address

    def put(self, array: Array) -> Array:
        """A copy of it there."""
        array = np.ascontiguousarray(array)
        place = self.all[self._used : self._used + array.nbytes]
        self._used += -(-array.nbytes // 64) * 64 + 64
        assert self._used <= BYTES
        copy: Array = place.view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def room(self, nbytes: int) -> int:
        return at(self.put(np.zeros(nbytes, np.uint8)))

    def struct(self, layout: str, *values: float) -> int:
        return at(self.put(np.frombuffer(struct.pack("=" + layout, *values), np.uint8)))

    def bf16(self, *shape: int) -> Array:
        return self.put(self.normal(BFLOAT16, *shape))

    def normal(self, kind: int, *shape: int) -> Array:
        """Normal numbers of a kind; bfloat16 is uint16."""
        values = self.random.standard_normal(shape).astype(np.float32)
        if kind == INT8:
            return self.random.integers(-127, 128, shape, dtype=np.int8)
        if kind == BFLOAT16:
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(np.float16).view(np.uint16) if kind == FLOAT16 else values

    def codes(self, *shape: int) -> Array:
        return self.put(self.random.integers(0, 256, shape, dtype=np.uint8))

    def nf4(self, n: int, k: int) -> tuple[Array, Array]:
        """Codes and absmax of a matrix."""
        return self.codes(n, k // 2), self.put(self.normal(BFLOAT16, k // 64, n) & 0x7FFF)

    def levels(self, bits: int) -> int:
        most = 127 if bits == 8 else 4096
        return at(self.put(np.linspace(-most, most, 16).astype(np.int8 if bits == 8 else np.int16)))


def at(array: Array) -> int:
    return int(array.ctypes.data)


def all_calls(memory: Memory) -> list[Call]:
    """Calls of every function, with outputs that no other call writes to."""
    makers = plain, columns, nf4, experts, attention, small, heads, nested
    return [call for make in makers for call in make(memory)]


def plain(memory: Memory) -> Iterator[Call]:
    n, k = 40, 1056  # a tile and a part, a chunk and a part
    scales = memory.bf16(n)
    for x_kind in (FLOAT32, BFLOAT16, FLOAT16):
        for w_kind in (BFLOAT16, FLOAT16, INT8):
            for m in (1, 5, 50):
                x, w = memory.put(memory.normal(x_kind, m, k)), memory.put(memory.normal(w_kind, n, k))
                y = memory.put(np.zeros((m, n), x.dtype))
                job = memory.struct("7q", at(x), at(w), at(scales), at(y), m, n, k)
                numbers = job, 1, 1, x_kind, w_kind, memory.room(m * (k + 16) * 4), THREADS
                yield Call("plain_products", f"kinds {x_kind} and {w_kind}, {m} rows", numbers, [y])


def columns(memory: Memory) -> Iterator[Call]:
    n, k = 128, 100
    groups = memory.put(memory.bf16(2, n, 2).view(np.uint32))
    for kind in (BFLOAT16, FLOAT16, NESTED4, NESTED8, NESTED3):
        for m in (1, 10):
            is_nested = kind in (NESTED4, NESTED8, NESTED3)
            w = memory.codes(n // 64, k, 32) if is_nested else memory.put(memory.normal(kind, k, n))
            low, x, y = memory.codes(n // 64, k, 32), memory.bf16(m, k), memory.bf16(m, n)
            job = memory.struct("9q", at(x), at(w), at(low), at(groups), at(y), m, n, k, k)
            numbers = job, 1, 1, BFLOAT16, kind, memory.room(m * 128 * 4), THREADS
            yield Call("columns_products", f"kind {kind}, {m} rows", numbers, [y])


def nf4(memory: Memory) -> Iterator[Call]:
    n, k = 64, 192
    codes, absmax = memory.nf4(n, k)
    for function in ("nf4_pack", "nf4_unpack"):
        out = memory.put(np.zeros_like(codes))
        yield Call(function, "", (at(codes), at(out), n, k // 2), [out])
    for bits in (16, 8):
        levels = memory.levels(bits)
        for m in (1, 2, 7, 50):
            x, y, rounded = memory.bf16(m, k), memory.bf16(m, n), memory.put(np.zeros((m, k * 4), np.uint8))
            yield Call("nf4_round", f"{bits} bits", (at(x), m, k, bits, at(rounded), THREADS), [rounded])
            x = memory.put(x)
            if m == 7:  # zeros, what is no number, and what has no end; tiny and huge numbers
                x[0, :64], x[1, 5], x[2, 70], x[3, 128:] = 0, 0x7FC1, 0xFF80, 0x0080
                x[4, ::3] |= 0x7000
            job = memory.struct("8q", at(x), at(codes), at(absmax), at(y), m, n, k, n)
            numbers = job, 1, 1, bits, levels, memory.room(4 * m * k), THREADS
            yield Call("nf4_products", f"{bits} bits, {m} rows", numbers, [y])


def experts(memory: Memory) -> Iterator[Call]:
    """Two experts of three rows, of which each goes to one; and one row that goes to both."""
    hidden, inner = 128, 64
    for tokens, top_k in ((6, 1), (1, 2)):
        rows = tokens * top_k // 2
        order = memory.put(np.arange(2 * rows)[::-1].astype(np.int64))
        x, y = memory.bf16(tokens, hidden), memory.bf16(2 * rows, hidden)
        parts: list[int] = []
        for i in range(2):
            biases = memory.bf16(2 * inner), memory.bf16(hidden)
            matrices = memory.bf16(2 * inner, hidden), memory.bf16(hidden, inner)
            parts += *map(at, (*biases, *matrices)), at(order) + 8 * rows * i, rows, rows * i
        room = memory.room(2 * rows * (hidden + 16) * 4), memory.room(2 * rows * (inner + 16) * 4)
        sum_, outputs = sum_of(memory, y, tokens)
        told = memory.struct("14q", *parts), 2, hidden, inner, top_k, at(x), at(y), *room
        job = memory.struct("10q3dq", *told, sum_, 1.5, 1.7, 1.0, tokens == 1)
        yield Call("plain_experts", f"{rows} rows", (job, THREADS), [y, *outputs])
        for bits in (16, 8):
            parts, rounded, y = [], memory.room(4 * tokens * hidden), memory.bf16(2 * rows, hidden)
            sum_, outputs = sum_of(memory, y, tokens)
            for i in range(2):
                biases = (0, 0) if i else (at(memory.bf16(2 * inner)), at(memory.bf16(hidden)))
                fields = *memory.nf4(2 * inner, hidden), *memory.nf4(hidden, inner)
                parts += *biases, *map(at, fields), at(order) + 8 * rows * i, rows, rows * i
            yield Call("nf4_round", "for experts", (at(x), tokens, hidden, bits, rounded, THREADS))
            told = memory.struct("18q", *parts), 2, hidden, inner, top_k, at(x) if tokens == 1 else 0, rounded, at(y)
            told = *told, memory.levels(bits), bits, memory.room(8 * rows * inner * 4), sum_
            job = memory.struct("12q3dq", *told, float("inf"), 1.0, 0.0, bits == 8)
            yield Call("nf4_experts", f"{bits} bits, {rows} rows", (job, THREADS), [y, *outputs])


def sum_of(memory: Memory, y: Array, tokens: int) -> tuple[int, list[Array]]:
    """What is told of the sum of one token's experts, and where it goes; nothing for several tokens."""
    if tokens > 1:
        return 0, []
    top_k, hidden = y.shape
    weights, before, out = memory.bf16(top_k), memory.bf16(hidden), memory.bf16(hidden)
    return memory.struct("8q", *map(at, (y, weights, before, out)), 1, top_k, hidden, 1), [out]


def attention_job(
    memory: Memory, x: int, y: int, key: Array, value: Array, group: int, mask: int, added: bool = False, sinks: int = 0
) -> tuple[float, ...]:
    shared, length, width = key.shape
    strides = shared * length * width, length * width, width
    room = memory.room(4 * shared * -(-length // 256) * -(-group // 8) * 8 * (width + 2))
    sizes = 1, shared, group, length, width, width**-0.5
    return (x, at(key), at(value), *strides, *strides, mask, 0, added, sinks, y, room, *sizes)


def attention(memory: Memory) -> Iterator[Call]:
    length, width = 300, 64
    for group in (1, 2, 3, 9):
        x, y = memory.bf16(2 * group, width), memory.bf16(2 * group, width)
        key, value = memory.bf16(2, length, width), memory.bf16(2, length, width)
        masks = {False: memory.put(memory.random.integers(0, 2, length, dtype=np.uint8)), True: memory.bf16(length)}
        for added, mask in masks.items():
            sinks = at(memory.bf16(2 * group)) if added else 0
            told = at(mask) if group > 1 else 0, added, sinks
            job = memory.struct("20qd", *attention_job(memory, at(x), at(y), key, value, group, *told))
            yield Call("attention", f"{group} queries, mask added {added}", (job, THREADS), [y])


def small(memory: Memory) -> Iterator[Call]:
    """Norms, sums of experts' outputs, and routers."""
    for flag in (0, 1):
        x, weight, y = memory.bf16(3, 136), memory.bf16(136), memory.bf16(3, 136)
        numbers = at(x), at(weight), at(y), 3, 136, flag, THREADS
        yield Call("rms_norm", f"twice {flag}", numbers, [y], 5, 1e-6)
        x, y = memory.bf16(5, 6, 136), memory.bf16(5, 136)
        weight = memory.bf16(5, 6) if flag else memory.put(memory.normal(FLOAT32, 5, 6))
        for before in (0, at(memory.bf16(5, 136))):
            job = memory.struct("8q", at(x), at(weight), before, at(y), 5, 6, 136, flag)
            yield Call("combine", f"rounds {flag}, added {before > 0}", (job, THREADS), [y])
        job, outputs = router(memory, at(memory.bf16(96)), 96, flag)
        yield Call("route", f"{flag}", (job, THREADS), outputs)


def router(memory: Memory, token: int, k: int, flag: int) -> tuple[int, list[Array]]:
    """What is told of a router of 20 experts, of which it chooses 4, and where what it says goes."""
    scores, rounded = memory.bf16(20), memory.bf16(4)
    chosen, weights = memory.put(np.zeros(4, np.int64)), memory.put(np.zeros(4, np.float32))
    bias = at(memory.bf16(20)) if flag else 0
    outputs = [scores, chosen, weights, rounded]
    told = token, at(memory.bf16(20, k)), bias, *map(at, outputs), memory.room(1 << 12), 20, k, 4, flag, flag
    return memory.struct("13q", *told), outputs


def row_matrix(memory: Memory, bits: int, n: int, k: int) -> list[int]:
    """Where the codes and the absmax of an NF4 matrix are, or with no bits the numbers of one of bfloat16."""
    return [at(each) for each in memory.nf4(n, k)] if bits else [at(memory.bf16(n, k)), 0]


def heads_job(memory: Memory, x: int, hidden: int, width: int, bits: int, twice: bool) -> tuple[list[float], Array]:
    """What is told of projections to 6 heads of queries, 2 of keys and 2 of values; and where they all go."""
    counts = 6, 2, 2
    y = memory.bf16(sum(counts), width)
    parts: list[int] = []
    for i, count in enumerate(counts):
        matrix, bias, norm = (
            row_matrix(memory, bits, count * width, hidden),
            memory.bf16(count * width),
            memory.bf16(width),
        )
        parts += *matrix, at(bias), at(norm), at(y[sum(counts[:i])]), count * width, i < 2, width
    projections = memory.struct("24q", *parts), len(counts), hidden, width
    rotation = at(memory.bf16(width)), at(memory.bf16(width)), width // 2 if twice else 0
    return [
        x,
        *projections,
        *rotation,
        memory.levels(bits) if bits else 0,
        memory.room(4 * hidden),
        1e-6,
        bits,
        twice,
        0,
    ], y


def heads(memory: Memory) -> Iterator[Call]:
    """Queries, keys and values by themselves, and with the whole sublayer around them."""
    hidden, width, length, all_queries = 128, 64, 40, 6 * 64
    for bits in (16, 8, 0):
        told, y = heads_job(memory, at(memory.bf16(hidden)), hidden, width, bits, True)
        yield Call("token_heads", f"{bits} bits", (memory.struct("10qd3q", *told), THREADS), [y])
        normed = at(memory.bf16(hidden))
        told, y = heads_job(memory, normed, hidden, width, bits, False)
        key, value = memory.bf16(2, length, width), memory.bf16(2, length, width)
        result = memory.bf16(all_queries)
        inside = attention_job(memory, at(y), at(result), key, value, 3, 0)
        rows = *row_matrix(memory, bits, hidden, all_queries), at(memory.bf16(hidden)), hidden
        x_and_norms = [at(memory.bf16(hidden)) for _ in range(3)]
        total, last, room = memory.bf16(hidden), memory.bf16(hidden), memory.room(4 * all_queries)
        told_of_router, chosen = router(memory, at(last), hidden, 0)
        places = normed, at(total), at(last), room
        outside = *x_and_norms, memory.struct("4q", *rows), 1, hidden, *places, 1e-6, 0, told_of_router
        job = memory.struct("10qd2q10qd3q20qd", *outside, *told, *inside)
        yield Call("token_sublayer", f"{bits} bits", (job, THREADS), [total, last, key, value, result, *chosen])


def nested(memory: Memory) -> Iterator[Call]:
    blocks, k = 2, 82
    high, third, fourth = (memory.codes(blocks, rows, 32) for rows in (k // 2, -(-k // 4), -(-k // 4)))
    for fourth_at in (0, at(fourth)):
        out = memory.codes(blocks, k, 32)
        numbers = at(high), at(third), fourth_at, at(out), blocks, k * 16, len(third[0]) * 32
        yield Call("nested_upper", f"4 bits {fourth_at > 0}", numbers, [out])
    out = memory.codes(blocks, k, 32)
    yield Call("nested_fill", "", (at(high), at(out), blocks, k * 16), [out])
    groups, upper = memory.bf16(2, blocks * 64, 2), memory.codes(blocks, k, 32)
    for low, middle in ((0, 8.0), (0, 7.5), (at(memory.codes(blocks, k, 32)), 8.0)):
        for wide in (0, 1):
            y = memory.put(np.zeros((k, blocks * 64), np.float32 if wide else np.uint16))
            numbers = at(groups), at(upper), low, at(y), blocks * 64, k, wide, THREADS
            case = f"float32 {wide}, 8 bits {low > 0}, middle {middle}"
            yield Call("nested_weights", case, numbers, [y], 7, middle)
