"""The kernels compile for GPUs that are not there, and fit into their shared memory.

Triton's interpreter knows no registers, no layouts and no limits, so that what it runs may still
not start on a GPU. The compiler needs none: a driver that only names its target is enough.
"""

import importlib.util
import itertools
import os
import re
import subprocess

import pytest
import torch

HAS_COMPILER = (
    importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1"
)
pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs Triton's compiler")

# By compute capability, the shared memory that one program may take: A100, RTX 4090, H200.
ROOM = {80: 163 * 2**10, 89: 99 * 2**10, 90: 227 * 2**10}
# Bytes of registers that one thread may spill into device memory.
SPILL = 1024


def spilled(kernel, path):
    from triton import knobs

    path.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", told)[1])


INSTRUCTION = re.compile(r"\*/ +(?:@!?U?P\w+ +)?(\S+) +(.*?) *;")


def misread(kernel, path):
    """Where Hopper's code calculates with the descriptor of device memory, which no source does.

    ptxas 12.8 took it for the address of an operand of a product, and no error told it; or a
    register in which nothing is.
    """
    from triton import knobs

    path.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [(line, *match.groups()) for line in told.splitlines()
             if (match := INSTRUCTION.search(line))]  # fmt: skip
    held, found = set(), []
    filled = set().union(*(filled_by(name, operands) for _, name, operands in lines))
    for line, name, operands in lines:
        read = re.sub(r"g?desc\[UR\d+\]", "", operands)
        pair = filled_by(name, read)
        if not pair:
            continue  # what may put it away for later
        read = {int(one) for one in re.findall(r"\bUR(\d+)", read.partition(",")[2])}
        is_read = bool(held & read)
        if (is_read and name != "UMOV") or not read <= filled:
            found.append(line.strip())
        is_loaded = name == "ULDC.64" and "c[0x0][0x208]" in operands
        held = held | pair if is_loaded or (is_read and name == "UMOV") else held - pair
    return found


def read_where_sizes_are_one(kernel, target):
    """Triton's reading of a kernel whose every size is 1, which it takes for a constant.

    Raises:
        CompilationError: The kernel does with a size what no constant can do.
    """
    from triton._C.libtriton import ir
    from triton.compiler import ASTSource, make_backend

    source, backend, context = kernel.src, make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options, kinds, ones = backend.parse_options({}), dict(source.signature), {}
    for place, (name, kind) in enumerate(source.signature.items()):
        if kind in ("i32", "i64"):
            kinds[name], ones[(place,)] = "constexpr", 1
    attributes = {place: told for place, told in source.attrs.items() if place not in ones}
    ASTSource(source.fn, kinds, source.constants | ones, attributes).make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(),
        context,
    )  # fmt: skip


def filled_by(name, operands):
    """The uniform registers that an instruction writes."""
    if (written := re.match(r"UR(\d+)", operands)) is None:
        return set()
    first = int(written[1])
    return {first, first + 1} if re.search(r"\.(64|WIDE)", name) else {first}


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Names a GPU; from then on kernels are compiled for it, checked, and not launched."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from attnzoo.ops.delta_rule import triton as delta
    from attnzoo.ops.depthwise_conv import triton as stencils
    from attnzoo.ops.gated_scan import triton as gated
    from attnzoo.ops.linear_core import triton as linear
    from attnzoo.ops.routed_linear import triton as grouped
    from attnzoo.ops.token_difference import triton_backward

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    found, exchanges = {}, {}

    def on(capability, only=None):
        class Driver:
            def get_current_device(self):
                return capability  # so that no cache takes one GPU for another

            def get_current_stream(self, device):
                return 0

            def get_current_target(self):
                return GPUTarget("cuda", capability, 32)

        compile_only = JITFunction.run

        def run(self, *args, grid, warmup, **kwargs):
            name = self.fn.__name__
            if only is not None and name != only:
                return None
            kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
            if name not in found:
                read_where_sizes_are_one(kernel, Driver().get_current_target())
            taken = kernel.metadata.shared
            assert taken <= ROOM[capability], f"{name} takes {taken} bytes"
            found[name] = max(found.get(name, 0), spilled(kernel, tmp_path / "kernel.cubin"))
            exchanges[name] = max(exchanges.get(name, 0), kernel.asm["ptx"].count("shfl.sync"))
            assert capability != 90 or misread(kernel, tmp_path / "kernel.cubin") == [], name
            return kernel

        monkeypatch.setattr(driver, "_active", Driver())
        monkeypatch.setattr(JITFunction, "run", run)
        if capability == 89:  # written out, their loops take the compiler twice as long
            for blocks in (stencils.STENCIL_BLOCK, stencils.STENCIL_WEIGHT_BLOCK):
                for size, block in blocks.items():
                    monkeypatch.setitem(blocks, size, (*block[:5], 1, block[6]))
        for module in (delta, gated, grouped, linear, triton_backward):
            monkeypatch.setattr(module, "_shared_memory", lambda device: ROOM[capability])
        return found

    on.exchanges = exchanges
    return on


# With ``every``, whatever kernels are told to leave out or put in is told to tiles of every size.


def launch_difference(dtype, choices, every, width=384):
    from attnzoo.ops.token_difference import Operands, triton_backward
    from attnzoo.ops.token_difference.triton import difference_forward
    from attnzoo.ops.token_difference.triton_backward import difference_backward

    z = torch.ones(1, 256, width, dtype=dtype)
    routers = [torch.ones(choices, columns, dtype=dtype) for columns in (width, width, 2 * width)]
    gammas, lambdas, norm = torch.ones(2, choices), torch.ones(choices), torch.ones(1, width)
    sides, few = [(None, 1), (norm, 6), (norm, 1)], (8192, 0)  # keys, and queries
    cases = itertools.product(sides, few) if every else zip(sides, few, strict=False)
    for (key_sum, heads), triton_backward.FEW_ROWS in cases:
        operands = Operands(
            z, z, *routers, gammas, lambdas, None, key_sum, 1e-6, heads, True, True
        )
        out, sums, *saved = difference_forward(*operands)
        difference_backward(out, sums if key_sum is None else None, *saved, *operands)


def launch_maps(dtype, choices=9, width=128):
    from attnzoo.ops.map_difference import triton as kernels
    from attnzoo.ops.map_difference.operands import Operands

    z, gates = torch.ones(1, 64, width, dtype=dtype), torch.ones(2, 1, 64)
    routers = [torch.ones(choices, columns, dtype=dtype) for columns in [width] * 4 + [2 * width]]
    scalars = torch.ones(choices), torch.ones(choices)
    operands = Operands(
        z, z, z, z.repeat(2, 1, 1)[:, None], gates, *routers, *scalars, 1e-6, True, True
    )
    out, *saved = kernels.map_forward(*operands)
    kernels.map_backward(out, *saved, *operands)


def launch_routing(dtype, experts, every, width=384):
    from attnzoo.ops.routed_linear import triton as kernels
    from attnzoo.ops.routed_linear import triton_scalar

    x, weight = torch.ones(512, width, dtype=dtype), torch.ones(experts, width, 64, dtype=dtype)
    router = torch.ones(experts, width, dtype=dtype)
    index, probability = kernels.top1(x, router, router)
    order, ends = kernels.sort_by_expert(index, 2 * experts)
    out = kernels.grouped_product(x, weight, order, ends, weight)
    logits, _ = kernels.gate_gradients(torch.ones(2, 512), x, router, index, probability)
    gates = logits, (router, router)
    kernels.grouped_input_gradient(out, (weight, weight), order, ends, gates)
    kernels.grouped_weight_gradient(x, out, order, ends, 2 * experts)
    parts, learns = ((None, router), (x, torch.cat([router, router], 1))), (False, True)
    cases = itertools.product(parts, learns) if every else zip(parts, learns, strict=True)
    for (other, line), learn in cases:
        operands = x, other, line, line[:, 0].contiguous()
        scalars, *saved = triton_scalar._routed_scalar.function(*operands, learn)
        triton_scalar._routed_scalar_backward.function(scalars, *operands, *saved, learn)


def launch_linear(dtype, every, width=384):
    from attnzoo.ops.linear_core import triton as kernels

    packed = torch.ones(1, 512, 3 * width, dtype=dtype)
    sizes = width // 32, width // 64, width // 128, 1
    kinds = [("relu", True), ("elu", True), ("relu", False), ("relu", True)]
    cases = [*(itertools.product(sizes, kinds[:3]) if every else zip(sizes, kinds, strict=True))]
    for heads in sizes[: (3 if dtype == torch.bfloat16 else 2) if every else 1]:
        cases.append((heads, ("softmax", False)))
    for heads, kind in cases:
        options = heads, *kind, 1e-6
        out, *saved = kernels._linear_core.function(packed, None, None, *options)
        kernels._linear_core_backward.function(out, out, *saved, packed, None, None, *options)


def launch_packed(dtype, every, width=384):
    from attnzoo.ops.linear_core import triton_packed as kernels
    from attnzoo.ops.triton_common import column_sum

    qkv, weight = torch.ones(1, 256, 3 * width, dtype=dtype), torch.ones(32, 1, 5, 5, dtype=dtype)
    sizes, powers = (width // 32, 1), (3.0, 2.5)
    for heads, gamma in (itertools.product if every else zip)(sizes, powers):
        options = weight, weight[:, 0, 0, 0], qkv[0, 0, :width], heads, 16, 16
        options += "none", True, 1e-6, gamma, 1e-6
        out, *saved = kernels._packed_core.function(qkv, *options)
        kernels._packed_core_backward.function(out, *saved, qkv, *options)
    column_sum(qkv.expand(17, -1, -1).flatten(0, 1), dtype)


def launch_the_rest(dtype, width=384):
    from attnzoo.ops.depthwise_conv import triton as kernels
    from attnzoo.ops.depthwise_conv import triton_branches as branches
    from attnzoo.ops.normed_difference import triton as differences
    from attnzoo.ops.power_map import triton as maps

    z, gamma = torch.ones(256, width, dtype=dtype), torch.ones(256)
    _, stats = maps.power_map_forward(z, gamma)
    maps.power_map_backward(z, z, gamma, stats)
    _, stats = maps._scaled_forward(z, z[0], 3.0, 1e-6)
    maps._scaled_backward(z, z, z[0], stats, 3.0, 1e-6)
    by_head, factor = z.view(1, 256, 3, -1).transpose(1, 2), gamma[0]
    differences._backward(z, by_head, by_head, factor, by_head[0, 0, 0], 1e-5, 1.0)
    differences._forward(by_head, by_head, factor, by_head[0, 0, 0], 1e-5, 1.0)
    tokens, weight = z[None], torch.ones(width, 1, 7, 7, dtype=dtype)
    packed = tokens.repeat(1, 1, 2)
    out, raw = kernels._gated_stencil.function(packed, weight, weight, 16, 16, True)
    kernels._gated_stencil_backward.function(out, raw, packed, weight, 16, 16)
    weights = [torch.ones(width, 1, *size) for size in ((3, 3), (3, 1), (1, 3))]
    gains, grid = torch.ones(3, width), (16, 16)
    out, stats = branches._normed_branches.function(
        tokens, *weights, gains, gains, tokens, 1e-5, *grid
    )
    branches._normed_branches_backward.function(out, stats, tokens, *weights, gains, *grid)


def launch_norms_and_windows(dtype, every, width=384):
    from attnzoo.ops.agent_core import triton as agents
    from attnzoo.ops.block_core import triton as states
    from attnzoo.ops.block_core import triton_pairs as pairs
    from attnzoo.ops.downsample import triton as windows
    from attnzoo.ops.few_keys import triton as few
    from attnzoo.ops.fixation_core import triton as fixed
    from attnzoo.ops.gated_norm import triton as gates
    from attnzoo.ops.group_norm import triton as groups
    from attnzoo.ops.neighborhood import triton as neighbors
    from attnzoo.ops.rotary_core import triton as turned
    from attnzoo.ops.windows import triton as sides

    x = torch.ones(1, 256, width, dtype=dtype)
    by_head, ones = x.unflatten(-1, (6, -1)), x[0, 0]
    gates._forward.function(by_head, by_head, ones[:64], 1e-5)
    gates._backward.function(x, by_head, by_head, ones[:64], 1e-5)
    _, stats = groups._forward.function(x, ones, 32, ones, ones, 1e-5, 0.01)
    groups._backward.function(x, stats, x, ones, ones, ones, 32, 0.01)
    for size, padding in ((2, 0), (3, 1)):
        weight = torch.ones(width, 1, size, size, dtype=dtype)
        out = windows._forward.function(x, weight, ones, 16, 16, 2, padding)
        windows._backward.function(out, x, weight, 16, 16, 2, padding)
    for size in (2, 4) if every else (2,):
        sizes = 16, 16, size, size
        sides._from_windows.function(sides._to_windows.function(x, *sizes), *sizes)
    sides._from_windows.function(weight.view(width, 1, 9), 3, 3, 3, 3)
    weight = torch.ones(width, 1, 3, 3, dtype=dtype)
    # Float32 takes as many agents of 32 channels as half precision of 128.
    cases = [(12, 8), (12, 4)] if dtype == torch.float32 else [(3, 8), (6, 8)]
    for heads, cells in cases if every else cases[:1]:
        sizes = weight, ones, heads, 16, 16, cells, cells
        qkv = x.repeat(1, 1, 3)
        out, *saved = agents._forward.function(qkv, *sizes)
        agents._backward.function(out, *saved, qkv, *sizes)
    counts = (32,) if dtype == torch.float32 else (128, 64)  # of 64 channels
    for keys in counts if every else counts[:1]:
        key = torch.ones(1, keys, width, dtype=dtype)
        few._forward.function(x, key, key, 6)
        few._backward.function(x, x, key, key, 6)
    for radius in (0, 8):
        sizes = x, x, x, width // 128, 16, 16, 7, 1 + (not radius), radius  # the widest heads
        saved = neighbors._forward.function(*sizes)
        if every or not radius:
            neighbors._backward.function(x, *saved, *sizes)

    heads = width // 64  # the widest that are served
    for kernels, most, size in ((states, 64, (2, 2)), (pairs, pairs.MOST_BLOCKS, (4, 2))):
        sizes = qkv, torch.ones(most, most), None, None, heads, 16, 16, *size, 1e-6
        out, *saved = kernels._forward.function(*sizes)
        kernels._backward.function(out, *saved, *sizes)
    d = 32 if dtype == torch.float32 else 64  # the widest heads
    sizes = qkv, torch.ones(d, 3 * d), ones[:d], width // d, 16, 16, True, 1e-6
    out, *saved = fixed._forward.function(*sizes)
    fixed._backward.function(out, *saved, *sizes)
    table = torch.ones(2, 16, 16)
    for is_weighed in (False, True):
        sizes = qkv, x, table, None, None, heads, 16, 16, is_weighed, 1e-6
        out, *saved = turned._forward.function(*sizes)
        turned._backward.function(out, *saved, *sizes)


def launch_sparse(dtype, every):
    from attnzoo.ops import sparse_linear
    from attnzoo.ops.sparse_linear import triton as kernels

    widest = sparse_linear.WIDEST if dtype == torch.float32 else sparse_linear.WIDEST_HALF
    cases = [(64, 64, 4096), (64, widest, 4095)] if every else [(32, 32, 2047)]
    for block, d, n in cases:
        x, weight = torch.ones(1, n, 3 * d, dtype=dtype), torch.ones(d, d, dtype=dtype)
        is_joined = dtype == torch.bfloat16 and d <= 64
        for learned in [(weight, weight[0])] * is_joined + [(None, None)] * every:
            options = *x.chunk(3, dim=-1), *learned, 1, block, 12, True, 1e-5
            near, out, *saved = kernels._forward.function(*options)
            kernels._backward.function(out, out, near, *saved, *options)


def launch_gated(dtype, key_dim=32, value_dim=64, directions=0b0011):
    from attnzoo.ops.gated_scan import triton as kernels
    from attnzoo.ops.gated_scan import triton_tokens

    key, value = (torch.ones(1, 256, 2, d, dtype=dtype) for d in (key_dim, value_dim))
    packed = torch.ones(1, 256, 4 * (key_dim + value_dim) + 16, dtype=dtype)
    weight, norm = torch.ones(2 * key_dim, 16, dtype=dtype), torch.ones(value_dim)
    options = 2, 1e-5, 16.0, 16, 16, directions, True
    out, *_, states = triton_tokens._forward.function(packed, weight, weight[:, 0], norm, *options)
    options = 16.0, 1.0, 16, 16, directions
    kernels.gated_scans_backward(out.view(value.shape), key, key, value, key, states, *options)


def launch_delta(dtype, width=64, bits=0b0011):
    from attnzoo.ops.delta_rule import triton as kernels
    from attnzoo.ops.delta_rule import triton_gates

    gate, z = torch.ones(1, 256, bits.bit_count(), 2), torch.ones(1, 256, 6 * width, dtype=dtype)
    operands = z, None, None, gate, gate, 2, 1.0, 16, 16, bits
    out, *saved = kernels.delta_scans_forward.function(*operands, True)
    kernels.delta_scans_backward.function(out, *saved, *operands)
    scalars = z[..., : 4 * bits.bit_count()], gate[0, 0], gate[0, 0]
    triton_gates._backward.function(*triton_gates._forward.function(*scalars), *scalars)


def launch_scan(dtype, width=384):
    from attnzoo.ops.causal_conv import triton as convolutions
    from attnzoo.ops.hourglass import triton as glasses
    from attnzoo.ops.selective_scan import triton as scans
    from attnzoo.ops.silu_gate import triton as gates

    x, ones, rates = (
        torch.ones(1, 256, width, dtype=dtype),
        torch.ones(width),
        torch.ones(width, 16),
    )
    operands = x, x, rates, x[..., :16], x[..., :16], ones, ones
    scans.scan_forward.function(*operands, False, False)
    out, states = scans.scan_forward.function(*operands, True, True)
    scans.scan_backward.function(out, states, *operands, True)
    weight = torch.ones(width, 1, 4, dtype=dtype)
    convolutions._forward.function(x, weight, ones, True)
    convolutions._backward.function(x, x, weight, ones, True)
    gates._forward.function(x, x, x)
    gates._backward.function(x, x, x, x)
    pair = x.repeat(1, 1, 2)
    glasses._spread.function(glasses._means.function(pair, 2), 256, 2)
    for options in ((None, 2, False), (x, 2, True)):
        glasses._forward.function(pair, x[:, :128], *options)
        glasses._backward.function(x, pair, x[:, :128], *options)


def launch_inner(dtype):
    from attnzoo.ops import inner_loop
    from attnzoo.ops.inner_loop import triton as kernels

    e = inner_loop.WIDEST_HALF if dtype == torch.bfloat16 else inner_loop.WIDEST
    x, weight = torch.ones(1, 256, 9 * e, dtype=dtype), torch.ones(2, e, e, dtype=dtype)
    out, *saved = kernels._inner.function(
        x, weight, weight + 1, torch.ones(e, 1, 3, 3, dtype=dtype), None, 16, 16, 1.0
    )
    kernels._inner_backward.function(out, *saved, x, weight, weight + 1, 16, 16, 1.0)


KERNELS = {
    "_add_mean_kernel", "_block_fold_kernel", "_block_key_gradient_kernel", "_block_mix_kernel",
    "_block_mix_gradient_kernel", "_block_query_gradient_kernel", "_block_read_kernel",
    "_branch_gradient_kernel", "_branch_merge_kernel",
    "_branch_moments_kernel", "_branch_slopes_kernel", "_branch_sums_kernel",
    "_causal_conv_gradient_kernel", "_causal_conv_kernel", "_column_sum_kernel",
    "_count_kernel", "_delta_adjoint_kernel", "_delta_carry_kernel",
    "_delta_gates_gradient_kernel", "_delta_gates_kernel", "_delta_key_gradient_kernel",
    "_delta_output_kernel", "_delta_query_gradient_kernel", "_delta_update_kernel",
    "_difference_backward_kernel", "_difference_kernel", "_downsample_gradient_kernel",
    "_downsample_kernel", "_downsample_weight_kernel", "_elu_fold_kernel", "_elu_join_kernel",
    "_elu_key_gradient_kernel", "_elu_query_gradient_kernel", "_elu_read_kernel",
    "_elu_sum_kernel", "_few_keys_gradient_kernel", "_few_keys_kernel", "_few_keys_sum_kernel",
    "_fixation_fold_kernel", "_fixation_gradient_kernel",
    "_fold_kernel", "_gate_gradient_kernel", "_gate_logits_kernel", "_gated_carry_kernel",
    "_gated_gradient_kernel", "_gated_norm_backward_kernel", "_gated_norm_kernel",
    "_gated_output_kernel", "_gated_update_kernel", "_gather_gradient_kernel", "_gather_kernel",
    "_group_means_kernel", "_group_norm_backward_kernel", "_group_norm_kernel",
    "_group_spread_kernel", "_grouped_kernel", "_grouped_sum_kernel",
    "_grouped_weight_kernel", "_hand_out_gradient_kernel", "_hand_out_kernel",
    "_hourglass_gradient_kernel", "_hourglass_kernel", "_inner_fold_kernel",
    "_inner_key_kernel", "_inner_query_kernel", "_inner_read_kernel", "_join_kernel",
    "_key_gradient_kernel", "_map_features_kernel", "_map_gradient_kernel",
    "_map_router_kernel", "_means_kernel", "_mild_gradient_kernel", "_moments_kernel",
    "_neighborhood_kernel", "_neighborhood_key_kernel", "_neighborhood_query_kernel",
    "_normed_difference_backward_kernel", "_normed_difference_kernel", "_pair_kernel",
    "_pair_key_gradient_kernel", "_pair_query_gradient_kernel", "_place_kernel",
    "_pool_kernel", "_power_map_backward_kernel", "_power_map_kernel", "_query_gradient_kernel",
    "_read_kernel", "_router_gradient_kernel", "_scalar_gradient_kernel", "_scalar_kernel",
    "_scale_gradient_kernel", "_scaled_power_map_backward_kernel",
    "_scaled_power_map_kernel", "_selective_carry_kernel", "_selective_end_kernel",
    "_selective_gradient_kernel", "_selective_lay_kernel", "_selective_output_kernel",
    "_shift_back_kernel", "_silu_gate_gradient_kernel",
    "_silu_gate_kernel", "_sparse_choice_kernel", "_sparse_fold_kernel", "_sparse_key_kernel",
    "_sparse_query_kernel", "_sparse_read_kernel", "_sparse_rest_kernel", "_sparse_turn_kernel",
    "_spread_kernel", "_statistics_kernel", "_stencil_kernel",
    "_stencil_weight_kernel", "_step_gradient_kernel", "_step_kernel", "_state_sum_kernel",
    "_sums_kernel",
    "_tap_sums_kernel", "_top1_kernel", "_turn_kernel", "_wide_gradient_kernel",
    "_wide_read_kernel", "_windows_kernel",
}  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "dtype", "every"),
    [
        (89, torch.bfloat16, False),
        *(
            pytest.param(capability, dtype, True, marks=pytest.mark.slow)
            for capability in (89, 80, 90)
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ],
    ids=str,
)
def test_every_kernel_compiles(compiled, capability, dtype, every):
    found = compiled(capability)
    launch_routing(dtype, experts=7, every=every)
    launch_difference(dtype, choices=21, every=every)
    launch_maps(dtype)
    launch_linear(dtype, every)
    launch_packed(dtype, every)
    launch_the_rest(dtype)
    launch_gated(dtype)
    launch_delta(dtype)
    launch_norms_and_windows(dtype, every)
    launch_scan(dtype)
    launch_inner(dtype)
    launch_sparse(dtype, every)
    only_half = {"_mild_gradient_kernel"} if dtype == torch.float32 else set()
    assert set(found) == KERNELS - only_half
    assert {name: size for name, size in found.items() if size > SPILL} == {}
    # A scan that goes through exchanges between threads takes ten times as long.
    exchanges = compiled.exchanges
    assert exchanges["_selective_end_kernel"] == exchanges["_selective_output_kernel"] == 0
    assert exchanges["_selective_gradient_kernel"] <= 32  # sums over channels, of b and of c


def test_hopper_multiplies_what_is_meant(compiled):
    found = compiled(90, only="_mild_gradient_kernel")
    launch_gated(torch.bfloat16)
    assert found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_the_widest_gated_heads_fit(compiled, capability, dtype):
    found = compiled(capability)
    launch_gated(dtype, 128, 128)
    launch_gated(dtype, 16, 16, 0b1101)  # one direction of an order, and a sum of two orders
    assert {name: size for name, size in found.items() if size > SPILL} == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_any_scans_of_the_delta_rule_fit(compiled, capability, dtype):
    found = compiled(capability)
    launch_delta(dtype)
    launch_delta(dtype, 16, 0b1110)  # one direction of an order, and a sum of two orders
    assert {name: size for name, size in found.items() if size > SPILL} == {}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [89, 90])
def test_the_largest_routers_fit(compiled, capability):
    from attnzoo.ops.token_difference import MOST_CHOICES

    compiled(capability)
    launch_routing(torch.float32, experts=MOST_CHOICES, every=True)
    launch_difference(torch.float32, choices=MOST_CHOICES, every=True)
    launch_difference(torch.bfloat16, choices=MOST_CHOICES, every=True)
    launch_maps(torch.bfloat16, choices=MOST_CHOICES, width=768)


@pytest.mark.parametrize(
    "experts", [14, 300, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 128, 256))]
)
@pytest.mark.parametrize("tokens", [512, 2**22])
def test_the_sort_fits_whatever_is_sorted(compiled, tokens, experts):
    from attnzoo.ops.routed_linear import triton as kernels

    compiled(89)
    kernels.sort_by_expert(torch.zeros(tokens, dtype=torch.int32), experts)
