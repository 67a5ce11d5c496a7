"""Read and write rows of tensors in any float dtype; all conversions round to nearest, ties to even, as torch does.

bf16 and fp16 are converted through integers, so that no processor needs instructions for them.
"""

from __future__ import annotations

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..arguments import BFLOAT16, FLOAT16, FLOAT32
from .lanes import LANES, LanesType, address_of, constant, load, pointer, splat, store, vector

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F32, _F64 = ir.FloatType(), ir.DoubleType()


def jit(function):
    """Compile for calls from other compiled functions; Python cannot call it."""
    return numba.njit(function, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


# ------------------------------------------------------------------------------------------------------ dtypes as bits


def _like(shape, element):
    """The element type, or a vector of it where `shape` is one."""
    return vector(element) if isinstance(shape, ir.VectorType) else element


def _bfloat16_to_float(builder, x):
    wide = builder.zext(x, _like(x.type, _I32))
    return builder.bitcast(builder.shl(wide, constant(wide.type, 16)), _like(x.type, _F32))


def _float_to_bfloat16(builder, x):
    whole = _like(x.type, _I32)
    bits = builder.bitcast(x, whole)
    odd = builder.and_(builder.lshr(bits, constant(whole, 16)), constant(whole, 1))
    rounded = builder.add(bits, builder.add(odd, constant(whole, 0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", x, x)
    rounded = builder.select(is_nan, constant(whole, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, constant(whole, 16)), _like(x.type, _I16))


def _float16_to_float(builder, x):
    whole, floats = _like(x.type, _I32), _like(x.type, _F32)
    wide = builder.zext(x, whole)
    sign = builder.shl(builder.and_(wide, constant(whole, 0x8000)), constant(whole, 16))
    size = builder.shl(builder.and_(wide, constant(whole, 0x7FFF)), constant(whole, 13))
    # As an fp32 number, these bits have an exponent that is 112 too small; the product is exact, also if subnormal.
    value = builder.fmul(builder.bitcast(size, floats), constant(floats, 2.0**112))
    infinite = builder.icmp_unsigned(">=", size, constant(whole, 0x0F800000))
    special = builder.or_(size, constant(whole, 0x7F800000))
    bits = builder.select(infinite, special, builder.bitcast(value, whole))
    return builder.bitcast(builder.or_(bits, sign), floats)


def _float_to_float16(builder, x):
    whole, floats = _like(x.type, _I32), _like(x.type, _F32)
    bits = builder.bitcast(x, whole)
    sign = builder.and_(builder.lshr(bits, constant(whole, 16)), constant(whole, 0x8000))
    size = builder.and_(bits, constant(whole, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, constant(whole, 13)), constant(whole, 1))
    rounded = builder.add(builder.sub(size, constant(whole, 112 << 23)), builder.add(odd, constant(whole, 0xFFF)))
    normal = builder.lshr(rounded, constant(whole, 13))
    # Below 2^-14: added to 0.5, the last bit of the sum is that of a subnormal, and the addition rounds.
    small = builder.fadd(builder.bitcast(size, floats), constant(floats, 0.5))
    subnormal = builder.sub(builder.bitcast(small, whole), constant(whole, 0x3F000000))
    value = builder.select(builder.icmp_unsigned("<", size, constant(whole, 113 << 23)), subnormal, normal)
    too_large = builder.icmp_unsigned(">=", size, constant(whole, 0x477FF000))
    value = builder.select(too_large, constant(whole, 0x7C00), value)
    is_nan = builder.icmp_unsigned(">", size, constant(whole, 0x7F800000))
    value = builder.select(is_nan, constant(whole, 0x7E00), value)
    return builder.trunc(builder.or_(value, sign), _like(x.type, _I16))


def _same(builder, x):
    return x


# By name: element type in memory, from there to fp32 or float64, and back.
_FORMATS = {
    "float32": (_F32, _same, _same),
    "bfloat16": (_I16, _bfloat16_to_float, _float_to_bfloat16),
    "float16": (_I16, _float16_to_float, _float_to_float16),
    "float64": (_F64, _same, _same),
}


def _cast(builder, x, element):
    """fp32 or float64 to the other."""
    target = _like(x.type, element)
    if x.type == target:
        return x
    return builder.fpext(x, target) if element == _F64 else builder.fptrunc(x, target)


def _reader(name, whole):
    """Intrinsic that reads lanes, or one number, of a dtype at an address, in the arithmetic of the pointer p."""
    element, decode, _ = _FORMATS[name]

    @intrinsic
    def read(typingctx, address, p):
        result = LanesType(p.dtype) if whole else p.dtype

        def codegen(context, builder, signature, args):
            kind = vector(element) if whole else element
            x = builder.load(builder.inttoptr(args[0], kind.as_pointer()), align=2)
            return _cast(builder, decode(builder, x), _F32 if p.dtype == types.float32 else _F64)

        return result(types.int64, p), codegen

    return read


def _writer(name):
    """Intrinsic that writes lanes to an address in a dtype."""
    _element, _, encode = _FORMATS[name]

    @intrinsic
    def write(typingctx, address, x):
        def codegen(context, builder, signature, args):
            value = encode(builder, _cast(builder, args[1], _F64 if name == "float64" else _F32))
            place = builder.inttoptr(args[0], value.type.as_pointer())
            builder.store(value, place, align=2)
            return context.get_dummy_value()

        return types.void(types.int64, x), codegen

    return write


def _rounder(name):
    """Intrinsic that rounds lanes to a dtype."""
    _, decode, encode = _FORMATS[name]

    @intrinsic
    def rounded(typingctx, x):
        def codegen(context, builder, signature, args):
            value = decode(builder, encode(builder, _cast(builder, args[0], _F32)))
            return _cast(builder, value, _F32 if x.dtype == types.float32 else _F64)

        return x(x), codegen

    return rounded


_float32s, _bfloat16s, _float16s, _float64s = (_reader(name, True) for name in _FORMATS)
_float32, _bfloat16, _float16, _float64 = (_reader(name, False) for name in _FORMATS)
_to_float32, _to_bfloat16, _to_float16, _to_float64 = (_writer(name) for name in _FORMATS)
_round_to_bfloat16, _round_to_float16 = _rounder("bfloat16"), _rounder("float16")


# ---------------------------------------------------------------------------------------------------------- functions


@jit
def size_of(dtype):
    """Bytes of a number; `dtype` is a code of `hf_gdn.kernels.numba.arguments`."""
    return 4 if dtype == FLOAT32 else 2 if dtype in (BFLOAT16, FLOAT16) else 8


@jit
def read_lanes(address, dtype, p):
    """`LANES` numbers at an address."""
    if dtype == FLOAT32:
        return _float32s(address, p)
    if dtype == BFLOAT16:
        return _bfloat16s(address, p)
    if dtype == FLOAT16:
        return _float16s(address, p)
    return _float64s(address, p)


@jit
def read_one(address, dtype, p):
    """One number at an address."""
    if dtype == FLOAT32:
        return _float32(address, p)
    if dtype == BFLOAT16:
        return _bfloat16(address, p)
    if dtype == FLOAT16:
        return _float16(address, p)
    return _float64(address, p)


@jit
def write_lanes(address, dtype, x):
    """Write lanes to an address, rounded to the dtype."""
    if dtype == FLOAT32:
        _to_float32(address, x)
    elif dtype == BFLOAT16:
        _to_bfloat16(address, x)
    elif dtype == FLOAT16:
        _to_float16(address, x)
    else:
        _to_float64(address, x)


@jit
def rounded_to(dtype, x):
    """Lanes, rounded to the dtype."""
    if dtype == BFLOAT16:
        return _round_to_bfloat16(x)
    if dtype == FLOAT16:
        return _round_to_float16(x)
    return x


@jit
def copy_bytes(source, target, size):
    """Copy `size` bytes, an even number."""
    a, b = pointer(source, types.int16), pointer(target, types.int16)
    for i in range(size // 2):
        b[i] = a[i]


@intrinsic
def move_bytes(typingctx, source, target, size):
    """Copy `size` bytes; source and target may overlap."""

    def codegen(context, builder, signature, args):
        a, b = (builder.inttoptr(x, ir.IntType(8).as_pointer()) for x in args[:2])
        cgutils.raw_memmove(builder, b, a, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@jit
def _spread(a, b, step, n):
    for i in range(n):
        b[i * step] = a[i]


@jit
def write_column(source, target, step, size, n):
    """Copy n numbers of `size` bytes; in the target they are `step` numbers apart."""
    if size == 4:
        _spread(pointer(source, types.int32), pointer(target, types.int32), step, n)
    elif size == 2:
        _spread(pointer(source, types.int16), pointer(target, types.int16), step, n)
    else:
        _spread(pointer(source, types.int64), pointer(target, types.int64), step, n)


@jit
def zero_bytes(target, size):
    """Zero `size` bytes, an even number."""
    p = pointer(target, types.int16)
    for i in range(size // 2):
        p[i] = 0


@jit
def read_row(address, dtype, n, p):
    """Read n numbers to p, padded with zeros to a multiple of `LANES`."""
    size = size_of(dtype)
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        store(p, i, read_lanes(address + i * size, dtype, p))
    if whole < n:
        store(p, whole, splat(p, 0.0))
        for i in range(whole, n):
            p[i] = read_one(address + i * size, dtype, p)


@jit
def write_row(p, address, dtype, n, room):
    """Write n numbers of p, rounded to the dtype; `room` is scratch memory for `LANES` numbers."""
    size = size_of(dtype)
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        write_lanes(address + i * size, dtype, load(p, i))
    if whole < n:
        write_lanes(address_of(room), dtype, load(p, whole))
        copy_bytes(address_of(room), address + whole * size, (n - whole) * size)


@jit
def zero_row(p, n):
    """Set n numbers, rounded up to a multiple of `LANES`, to zero."""
    for i in range(0, n, LANES):
        store(p, i, splat(p, 0.0))


@jit
def copy_row(source, target, n):
    """Copy n numbers, rounded up to a multiple of `LANES`."""
    for i in range(0, n, LANES):
        store(target, i, load(source, i))
