"""Vectors of numbers for compiled functions: `LANES` numbers that are loaded, computed with and stored at once.

LLVM maps them to the processor's registers, whatever their size. Every operation is the same for every lane, so bits do
not depend on where in a row a number stands. Products are fused with additions only by `fma`.

A *pointer* is numba's ``CPointer`` to fp32 or float64 scratch memory; its type is the type of the arithmetic. An
*address* is an integer, of a tensor whose dtype is known at run time (`memory`).
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, register_model

from ..arguments import LANES

_BITS = ir.IntType(32)


class LanesType(types.Type):
    """`LANES` numbers of one type."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"lanes({dtype})")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, vector(ir.FloatType() if fe_type.dtype == types.float32 else ir.DoubleType()))


def vector(element):
    """LLVM's type of `LANES` elements."""
    return ir.VectorType(element, LANES)


def splatted(builder, x):
    """LLVM value with x in every lane."""
    one = builder.insert_element(ir.Constant(vector(x.type), ir.Undefined), x, ir.Constant(_BITS, 0))
    return builder.shuffle_vector(one, one, ir.Constant(vector(_BITS), [0] * LANES))


def constant(like, value):
    """LLVM constant of the type `like`, the same value in every lane of a vector."""
    if isinstance(like, ir.VectorType):
        return ir.Constant(like, [value] * like.count)
    return ir.Constant(like, value)


def _call(builder, name, values):
    """Call a function that LLVM knows, of values and a result of one vector type."""
    kind = values[0].type
    element = "f32" if isinstance(kind.element, ir.FloatType) else "f64"
    function = ir.FunctionType(kind, [kind] * len(values))
    name = f"{name}.v{LANES}{element}"
    declared = builder.module.globals.get(name) or ir.Function(builder.module, function, name)
    return builder.call(declared, values)


def _as_lanes(context, builder, x, given, dtype):
    """A number or a vector as a vector."""
    if isinstance(given, LanesType):
        return x
    return splatted(builder, context.cast(builder, x, given, dtype))


def _lanes_among(*given):
    return next((x for x in given if isinstance(x, LanesType)), None)


# ------------------------------------------------------------------------------------------------------------- memory


@intrinsic
def pointer(typingctx, address, dtype):
    """Pointer to numbers of `dtype` at an address."""
    result = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, dtype), codegen


@intrinsic
def pointer_like(typingctx, address, p):
    """Pointer to numbers of p's type at an address."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(p))

    return p(types.int64, p), codegen


@intrinsic
def address_of(typingctx, p):
    """Address of a pointer's first element."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], context.get_value_type(types.int64))

    return types.int64(p), codegen


@intrinsic
def at(typingctx, p, i):
    """Pointer to the element i of p."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return p(p, types.int64), codegen


@intrinsic
def load(typingctx, p, i):
    """Lanes at the elements from i on."""
    result = LanesType(p.dtype)

    def codegen(context, builder, signature, args):
        kind = context.get_value_type(result)
        place = builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer())
        return builder.load(place, align=4)

    return result(p, types.int64), codegen


@intrinsic
def store(typingctx, p, i, x):
    """Write lanes to the elements from i on."""

    def codegen(context, builder, signature, args):
        place = builder.bitcast(builder.gep(args[0], [args[1]]), args[2].type.as_pointer())
        builder.store(args[2], place, align=4)
        return context.get_dummy_value()

    return types.void(p, types.int64, x), codegen


@intrinsic
def take_ticket(typingctx, address):
    """Add one to an int64 that threads share; returns what it was."""

    def codegen(context, builder, signature, args):
        number = ir.IntType(64)
        place = builder.inttoptr(args[0], number.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(number, 1), "monotonic")

    return types.int64(types.int64), codegen


# --------------------------------------------------------------------------------------------------------- arithmetic


@intrinsic
def splat(typingctx, p, x):
    """x in every lane; p has the type of the arithmetic."""
    result = LanesType(p.dtype)

    def codegen(context, builder, signature, args):
        return _as_lanes(context, builder, args[1], x, p.dtype)

    return result(p, x), codegen


@intrinsic
def fma(typingctx, x, y, z):
    """x y + z, rounded once; numbers count as lanes."""
    result = _lanes_among(x, y, z)

    def codegen(context, builder, signature, args):
        values = [_as_lanes(context, builder, a, t, result.dtype) for a, t in zip(args, (x, y, z))]
        return _call(builder, "llvm.fma", values)

    return result(x, y, z), codegen


def _define_operator(symbol, name):
    """Define an operator, by the name of LLVM's instruction, of two lanes, or of lanes and a number."""

    @infer_global(symbol)
    class Operator(AbstractTemplate):
        def generic(self, args, kws):
            result = _lanes_among(*args)
            return None if result is None else result(*args)

    def codegen(context, builder, signature, args):
        dtype = signature.return_type.dtype
        values = (_as_lanes(context, builder, x, given, dtype) for x, given in zip(args, signature.args))
        return getattr(builder, name)(*values)

    for given in ((LanesType, LanesType), (LanesType, types.Number), (types.Number, LanesType)):
        lower_builtin(symbol, *given)(codegen)


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")


def _unary(name):
    """Intrinsic for a function of one vector that LLVM knows."""

    @intrinsic
    def function(typingctx, x):
        def codegen(context, builder, signature, args):
            return _call(builder, f"llvm.{name}", args)

        return x(x), codegen

    return function


sqrt = _unary("sqrt")
exp64 = _unary("exp")  # calls the C library for every lane


@intrinsic
def where_less(typingctx, x, y, yes, no):
    """`yes` where x < y, else `no`; also where x is NaN."""
    result = _lanes_among(x, y, yes, no)

    def codegen(context, builder, signature, args):
        a, b, c, d = (_as_lanes(context, builder, v, t, result.dtype) for v, t in zip(args, (x, y, yes, no)))
        return builder.select(builder.fcmp_ordered("<", a, b), c, d)

    return result(x, y, yes, no), codegen


@intrinsic
def total(typingctx, x):
    """Sum of all lanes, always the same tree: halves are added until one number is left."""

    def codegen(context, builder, signature, args):
        (v,) = args
        count = LANES
        while count > 1:
            count //= 2
            halves = [ir.Constant(ir.VectorType(_BITS, count), list(range(h * count, (h + 1) * count))) for h in (0, 1)]
            v = builder.fadd(*(builder.shuffle_vector(v, v, half) for half in halves))
        return builder.extract_element(v, ir.Constant(_BITS, 0))

    return x.dtype(x), codegen


@intrinsic
def first(typingctx, x):
    """The first lane."""

    def codegen(context, builder, signature, args):
        return builder.extract_element(args[0], ir.Constant(_BITS, 0))

    return x.dtype(x), codegen


@intrinsic
def times_power_of_two(typingctx, x, shifted):
    """x 2^n for fp32 lanes, where `shifted` is n + 1.5 2^23, whose last bits are n. Over- and underflow are as in C."""

    def codegen(context, builder, signature, args):
        whole = vector(_BITS)
        n = builder.sub(builder.bitcast(args[1], whole), constant(whole, 0x4B400000))
        half = builder.ashr(n, constant(whole, 1))
        value = args[0]
        for part in (half, builder.sub(n, half)):  # in two steps, because 2^n itself may overflow
            power = builder.shl(builder.add(part, constant(whole, 127)), constant(whole, 23))
            value = builder.fmul(value, builder.bitcast(power, args[0].type))
        return value

    return x(x, shifted), codegen


@intrinsic
def is_single(typingctx, p):
    """Whether the arithmetic is fp32, as a constant."""
    answer = p.dtype == types.float32

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(1), int(answer))

    return types.boolean(p), codegen
