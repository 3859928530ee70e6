"""Opcode -> builder of the per-thread (ALU / conversion) instructions."""

from __future__ import annotations

from .arith import b_arith, b_carry, b_div, b_rem
from .bits import b_bfe, b_bfi, b_bits, b_logic, b_lop3, b_prmt, b_shf, b_shift
from .compare import b_copysign, b_mov, b_selp, b_set, b_setp, b_slct, b_testp
from .convert import b_cvt
from .floats import b_minmax, b_mufu, b_neg_abs
from .integer import b_misc_int

ALU = {}
for _n in ("add", "sub", "mul", "mad", "fma"):
    ALU[_n] = b_arith
for _n in ("addc", "subc", "madc"):
    ALU[_n] = b_carry
ALU.update(
    div=b_div,
    rem=b_rem,
    neg=b_neg_abs,
    abs=b_neg_abs,
    min=b_minmax,
    max=b_minmax,
    shl=b_shift,
    shr=b_shift,
    shf=b_shf,
    prmt=b_prmt,
    lop3=b_lop3,
    bfe=b_bfe,
    bfi=b_bfi,
    setp=b_setp,
    set=b_set,
    selp=b_selp,
    slct=b_slct,
    copysign=b_copysign,
    testp=b_testp,
    mov=b_mov,
    cvt=b_cvt,
)
for _n in ("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"):
    ALU[_n] = b_mufu
for _n in ("and", "or", "xor", "not", "cnot"):
    ALU[_n] = b_logic
for _n in ("popc", "clz", "brev", "bfind"):
    ALU[_n] = b_bits
for _n in ("sad", "mul24", "mad24", "dp4a", "dp2a", "bmsk", "szext", "fns"):
    ALU[_n] = b_misc_int
