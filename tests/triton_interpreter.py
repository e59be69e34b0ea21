"""Makes bf16 right in Triton's interpreter (TRITON_INTERPRET=1), which holds it as uint16: in 3.9 a cast to it truncates, and
arithmetic and tl.dot work on the bit patterns. Here every operation widens bf16 to fp32 and rounds its result once to nearest,
ties to even, as the hardware does. Reductions and scans of bf16 raise TypeError: cast to fp32 first."""

import functools

import numpy as np


def widen(data):
    return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)


def narrow(data):
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


@functools.cache
def install():
    """Patches the interpreter of this process. Further calls do nothing."""
    import triton.language as tl  # here: the tests set TRITON_INTERPRET before triton is first imported
    from triton.runtime import interpreter

    builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(operand):
        return isinstance(operand, Handle) and operand.dtype.scalar == tl.bfloat16

    def through_fp32(method):
        def patched(self, *operands):
            out_is_bf16 = is_bf16([o for o in operands if isinstance(o, Handle)][-1])  # a dot's sum, or like all others
            out = method(self, *(Handle(widen(o.data), tl.float32) if is_bf16(o) else o for o in operands))
            if out_is_bf16 and out.data.dtype == np.float32:  # a comparison gives booleans
                return Handle(narrow(out.data), tl.bfloat16)
            return out

        return patched

    for name in ("binary_op", "unary_op", "ternary_op", "create_rsqrt", "create_fma", "create_dot"):
        setattr(builder, name, through_fp32(getattr(builder, name)))

    cast = builder.cast_impl

    def cast_impl(self, source, to):
        if is_bf16(source) and to.scalar != tl.bfloat16:
            return cast(self, Handle(widen(source.data), tl.float32), to)
        if to.scalar == tl.bfloat16 and not is_bf16(source):
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    builder.cast_impl = cast_impl

    check_tensor = interpreter.ReduceScanOpInterface.check_tensor

    def refuse_bf16(self, operands):
        if any(is_bf16(o.handle) for o in operands):
            raise TypeError("the interpreter reduces the bit patterns of bf16: cast to tl.float32 first")
        check_tensor(self, operands)

    interpreter.ReduceScanOpInterface.check_tensor = refuse_bf16
