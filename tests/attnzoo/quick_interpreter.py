"""Triton's interpreter, without what it works out again for each operation of each program.

A kernel's operations are few and its programs many, and nearly all of an interpreted kernel's
time goes to types: which array type stands for one, which shape two of them broadcast to, how a
number becomes a block. These are functions of types and numbers alone, so that their first answer
is cached. What a kernel computes, and what is refused, is left to Triton.
"""

import builtins

# A constant is cached for each block it met; more of them than this begin anew.
MOST_CONSTANTS = 2000


def quicken():
    """Once for a process, before the first kernel is interpreted."""
    from triton.runtime import interpreter

    _patch_language_once(interpreter)
    _cache_array_types(interpreter)
    _cache_blocks()
    _shorten_checks(interpreter)


def _patch_language_once(interpreter):
    """Each call of a function in a kernel patches Triton's language anew.

    It is patched by the first call from each module, and stays so.
    """
    own, done = interpreter._patch_lang, {}

    class Patched:
        def restore(self):
            pass

    def patch(function):
        if function.__module__ not in done:
            done[function.__module__] = own(function)
        return Patched()

    interpreter._patch_lang = patch

    def patch_attribute(owner, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)

        def call(*arguments, **named):
            named["_semantic"] = interpreter.interpreter_semantic
            return function(*arguments, **named)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch_attribute


def _cache_array_types(interpreter):
    own, found = interpreter._get_np_dtype, {}

    def array_type(dtype):
        scalar = dtype.scalar
        if scalar.is_ptr():
            return own(scalar)
        if scalar.name not in found:
            found[scalar.name] = own(scalar)
        return found[scalar.name]

    interpreter._get_np_dtype = array_type


def _cache_blocks():
    """One object for each type of block, which holds what its tensors share."""
    from triton.language import core

    block_type, tensor = core.block_type, core.tensor
    own, to_ir, blocks = block_type.__init__, block_type.to_ir, {}
    one, none = core.constexpr(1), core.tuple([])

    def new(cls, element_ty, shape):
        sizes = [size.value if isinstance(size, core.constexpr) else size for size in shape]
        key = element_ty.name, *sizes
        if any(type(size) is not int for size in sizes):
            return object.__new__(cls)
        if key not in blocks:
            block = object.__new__(cls)
            own(block, element_ty, shape)
            block.sizes, block.others, block.ir = builtins.tuple(sizes), {}, None
            block.shared = (
                core.constexpr(block.numel),
                core.tuple([core.constexpr(size) for size in sizes]),
            )
            blocks[key] = block
        return blocks[key]

    def initialize(self, element_ty, shape):
        if not hasattr(self, "sizes"):
            own(self, element_ty, shape)

    def with_element_ty(self, scalar_ty):
        name = scalar_ty.name
        if name not in self.others:
            self.others[name] = block_type(scalar_ty, self.shape)
        return self.others[name]

    def block_to_ir(self, builder):
        self.ir = self.ir or to_ir(self, builder)
        return self.ir

    def initialize_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.shared if type.is_block() else (one, none)

    block_type.__new__ = new
    block_type.__init__ = initialize
    block_type.with_element_ty = with_element_ty
    block_type.to_ir = block_to_ir
    tensor.__init__ = initialize_tensor


def _shorten_checks(interpreter):
    """Types decide how two operands meet, and numbers meet the same blocks again."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    tensor, cast, equal = core.tensor, TritonSemantic.cast, core.dtype.__eq__
    check = TritonSemantic.binary_op_type_checking_impl
    broadcast = TritonSemantic.broadcast_impl_value
    # Of these an array is never changed in its place.
    plain = {"int32", "int64", "fp16", "bf16", "fp32", "fp64"}
    kinds, shapes, constants = {}, {}, {}

    def checked(self, lhs, rhs, *options, **named):
        how = options, *named.items()
        if isinstance(lhs, tensor) and isinstance(rhs, tensor):
            key = lhs.dtype.name, rhs.dtype.name, how
            if key not in kinds:
                found = check(self, lhs, rhs, *options, **named)
                kinds[key] = [operand.dtype for operand in found]
                return found
            one, other = kinds[key]
            lhs = lhs if lhs.dtype.name == one.name else cast(self, lhs, one)
            rhs = rhs if rhs.dtype.name == other.name else cast(self, rhs, other)
            return made_compatible(self, lhs, rhs)
        operand, number = (lhs, rhs) if isinstance(lhs, tensor) else (rhs, lhs)
        is_plain = isinstance(operand, tensor) and operand.dtype.name in plain
        if not is_plain or type(number) not in (int, float):
            return check(self, lhs, rhs, *options, **named)
        sizes = operand.type.sizes if operand.type.is_block() else ()
        key = operand.dtype.name, sizes, type(number), number, lhs is number, how
        if key not in constants:
            found = check(self, lhs, rhs, *options, **named)
            kept, constant = found if operand is lhs else reversed(found)
            if kept is not operand:
                return found
            if len(constants) == MOST_CONSTANTS:
                constants.clear()
            constants[key] = constant
        return (lhs, constants[key]) if operand is lhs else (constants[key], rhs)

    def made_compatible(self, lhs, rhs):
        one, other = lhs.type, rhs.type
        if one is other or not (one.is_block() or other.is_block()):
            return lhs, rhs
        if not (one.is_block() and other.is_block()) or len(one.sizes) != len(other.sizes):
            return broadcast(self, lhs, rhs)
        if one.sizes == other.sizes:
            return lhs, rhs
        key = one.sizes, other.sizes
        if key not in shapes:
            shapes[key] = list(broadcast(self, lhs, rhs)[0].type.sizes)
        return [spread(self.builder, operand, shapes[key]) for operand in (lhs, rhs)]

    def spread(builder, operand, sizes):
        block = core.block_type(operand.dtype, sizes)
        if block is operand.type:
            return operand
        return tensor(builder.create_broadcast(operand.handle, sizes), block)

    def cast_to(self, input, dst_ty, *rounding):
        return input if input.dtype is dst_ty.scalar else cast(self, input, dst_ty, *rounding)

    def overflow(self, lhs, rhs, binary_op):
        """What it finds is asserted with debug alone, which the interpreter is not run with."""

    TritonSemantic.binary_op_type_checking_impl = checked
    TritonSemantic.broadcast_impl_value = made_compatible
    TritonSemantic.cast = cast_to
    if not interpreter.interpreter_builder.options.debug:
        TritonSemantic.binary_op_sanitize_overflow_impl = overflow
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
