"""torch.func: grad, jvp and vmap go through every mechanism, or are refused with a reason."""

import re
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from attnzoo import list_attention
from attnzoo.errors import Unavailable
from attnzoo.ops import dispatch
from attnzoo.ops.routed_linear import by_ones
from attnzoo.testing import build_scrambled, tokens

GRID, DIM = (4, 4), 16
PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
# What impl="torch" refuses, by the operator whose PyTorch version torch.func cannot see through.
REFUSED = {
    "dydila": {"grad", "jvp", "vmap"},
    "dydila-map": {"grad", "jvp", "vmap"},
    "focused": {"grad", "jvp", "vmap"},
    "diffussm": {"grad", "jvp", "vmap"},
    "dis": {"grad", "jvp", "vmap"},
    "zigma": {"grad", "jvp", "vmap"},
    "local": {"jvp", "vmap"},
}
WAYS = [
    (name, impl)
    for name in list_attention()
    for impl in ("auto", "reference", "torch")
    if impl != "auto" or name in REFUSED  # elsewhere it is "torch"
]


class Layer:
    """A mechanism as a function of its parameters and tokens."""

    def __init__(self, name, impl, **options):
        options |= {} if impl == "auto" else {"impl": impl}
        self.module = build_scrambled(name, DIM, **options)
        self.parameters = dict(self.module.named_parameters())
        self.refused = REFUSED.get(name, set()) if impl == "torch" else set()

    def __call__(self, parameters, x):
        return functional_call(self.module, parameters, (x, GRID))

    def loss(self, parameters, x):
        return self(parameters, x).square().sum()

    def gradients(self, x):
        """By autograd; 0 where it has none, as torch.func gives it."""
        found = torch.autograd.grad(
            self.loss(self.parameters, x), list(self.parameters.values()), allow_unused=True
        )
        pairs = zip(self.parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(map(str, way)))
def layer(request):
    return Layer(*request.param)


def outcome(layer, transform, compute):
    """What ``compute`` gives, or None where the mechanism refuses as it should."""
    if transform not in layer.refused:
        return compute()
    with pytest.raises(
        Unavailable, match=rf"torch.func's .*{transform}.*impl='reference'"
    ) as caught:
        compute()
    assert "\n" not in str(caught.value)
    return None


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_grad_is_autograds(layer):
    x = tokens(GRID, 2, DIM)
    found = outcome(layer, "grad", lambda: grad(layer.loss)(layer.parameters, x))
    if found is not None:
        close(found, layer.gradients(x))


def test_jvp_is_the_slope(layer):
    x, direction = tokens(GRID, 2, DIM), tokens(GRID, 2, DIM, seed=3)
    found = outcome(
        layer, "jvp", lambda: jvp(lambda x: layer(layer.parameters, x), (x,), (direction,))
    )
    if found is None:
        return
    # <cotangent, J direction> both ways: exact, where a difference quotient is not. A router that
    # learns through a straight-through gate has no such slope: its choice is constant.
    has_routers = "router_gradient" in type(layer.module).Config.__dataclass_fields__
    options = {"router_gradient": "none"} if has_routers else {}
    layer = Layer(layer.module.name, getattr(layer.module.config, "impl", "auto"), **options)
    x.requires_grad_()
    out = layer(layer.parameters, x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    [back] = torch.autograd.grad(out, x, cotangent)
    close(found[0], out.detach())
    close((found[1] * cotangent).sum(), (back * direction).sum())


def test_vmap_over_samples_is_the_batch(layer):
    x = tokens(GRID, 3, DIM)

    def one(x):
        return layer(layer.parameters, x[None])[0]

    found = outcome(layer, "vmap", lambda: vmap(one)(x))
    if found is not None:
        close(found, layer(layer.parameters, x))
        each = vmap(grad(lambda p, x: layer.loss(p, x[None])), (None, 0))(layer.parameters, x)
        close({name: z.sum(0) for name, z in each.items()}, layer.gradients(x))


def twice(layer, x):
    """Gradients of the square of the gradient of a loss, where there are any."""
    x = x.clone().requires_grad_()
    operands = [x, *layer.parameters.values()]
    [slope] = torch.autograd.grad(layer.loss(layer.parameters, x), x, create_graph=True)
    found = torch.autograd.grad(slope.square().sum(), operands, allow_unused=True)
    return [torch.zeros_like(p) if z is None else z for p, z in zip(operands, found, strict=True)]


def test_second_derivatives_are_the_references_or_refused(layer):
    x = tokens(GRID, 2, DIM)
    exact = twice(Layer(layer.module.name, "reference"), x)  # which every mechanism has
    try:
        found = twice(layer, x)
    except RuntimeError as error:  # of ours, or PyTorch's of its fused softmax
        assert re.search("impl='reference'|derivative for aten::", str(error))
        return
    for one, other in zip(found, exact, strict=True):
        tolerance = 1e-4 * (1 + other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=tolerance)


def test_the_page_lists_what_is_refused():
    text = PAGE.read_text("utf-8").split("## torch.func\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text, re.MULTILINE))
    assert {name: set(cell.split(", ")) for name, cell in rows.items()} == REFUSED


def test_a_kernel_by_name_is_not_replaced():
    layer = Layer("sana", "triton")
    with pytest.raises(Unavailable, match="triton"):
        grad(layer.loss)(layer.parameters, tokens(GRID, 2, DIM))


def test_thirds_of_no_images_have_gradients():
    from attnzoo.layers.linear import _Parts

    x = torch.randn(0, 4, 6, requires_grad=True)
    sum(z.sum() for z in _Parts.apply(x)).backward()
    assert x.grad.shape == x.shape
    # Gradients that are views of one number.
    x = torch.randn(2, 4, 6, requires_grad=True)
    query, key, value = _Parts.apply(x)
    (query.sum() + 2 * key.sum() + value.sum()).backward()
    torch.testing.assert_close(x.grad[0, 0], torch.tensor([1.0, 1, 2, 2, 1, 1]))


@pytest.mark.parametrize("name", ["linformer", "local", "mala"])
def test_tables_made_in_a_transform_do_not_outlive_it(name):
    """Nor those of an export, of which another found stand-ins where it looked for numbers."""
    grid = (3, 17)  # for which nothing else has filled a cache
    layer, x = build_scrambled(name, DIM, impl="torch"), tokens(grid, 1, DIM)
    grad(lambda x: layer(x, grid).sum())(x)
    module = torch.nn.Module()
    module.forward = lambda x: layer(x, grid)
    program = torch.export.export(module, (x,), strict=False).run_decompositions({})
    torch.testing.assert_close(program.module()(x), layer(x, grid))


@pytest.mark.parametrize("name", ["deltanet", "edit", "gated", "linformer", "ttt"])
def test_an_export_takes_any_number_of_images(name):
    layer, module = build_scrambled(name, DIM), torch.nn.Module()
    module.forward = lambda x: layer(x, GRID)
    sizes = ({0: torch.export.Dim("images", min=1, max=4096)},)
    program = torch.export.export(module, (tokens(GRID, 2, DIM),), dynamic_shapes=sizes)
    for images in (1, 5):
        x = tokens(GRID, images, DIM)
        torch.testing.assert_close(program.module()(x), layer(x, GRID))


class Fixed(torch.nn.Module):
    """A layer of one grid."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, GRID)


@pytest.mark.parametrize("is_strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize(
    ("name", "impl"),
    [
        ("dydila", "auto"),
        ("dydila-map", "torch"),
        ("fixation", "torch"),
        ("focused", "torch"),
        ("sana", "auto"),
        ("zigma", "torch"),
    ],
)
def test_an_exported_program_has_the_layers_gradients(name, impl, is_strict):
    """Of a function with a gradient of its own a program has what autograd makes, or none."""
    module, x = Fixed(build_scrambled(name, DIM, impl=impl)), tokens(GRID, 2, DIM)
    program = torch.export.export(module, (x,), strict=is_strict).module()
    cotangent, parameters = tokens(GRID, 2, DIM, seed=4), list(module.parameters())  # of both
    for ours, theirs in zip(
        *(torch.autograd.grad(call(x), parameters, cotangent) for call in (program, module)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_an_exported_gate_learns():
    class Gate(torch.nn.Module):
        def forward(self, x, gate):
            return by_ones(x, gate)

    x = torch.randn(3, 4)
    program = torch.export.export(Gate(), (x, torch.ones(3, requires_grad=True))).module()
    gate = torch.ones(3, requires_grad=True)
    program(x, gate).sum().backward()
    close(gate.grad, x.sum(-1))


class Images(torch.nn.Module):
    """A layer of any grid."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, image):
        return self.layer(image.flatten(2).transpose(1, 2), tuple(image.shape[2:]))


def names_of_one_grid():
    text = PAGE.read_text("utf-8").split("## torch.export\n")[1].split("\n## ")[0]
    return re.findall(r"`([\w-]+)`", text.split('("Guard failed"):')[1])


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("agent", "mala", "sana") else pytest.param(name, marks=pytest.mark.slow)
        for name in list_attention()
        if name not in names_of_one_grid()
    ],
)
def test_an_export_takes_any_grid(name):
    """Also from a grid so small that another order of products is the cheaper one for it."""
    dim = 32
    module = Images(build_scrambled(name, dim))
    # Even, as what halves a side keeps whether a token is left over.
    sides = {side: 2 * torch.export.Dim(f"half{side}", min=2, max=32) for side in (2, 3)}
    program = torch.export.export(module, (torch.randn(2, dim, 4, 6),), dynamic_shapes=(sides,))
    for grid in ((4, 6), (6, 4), (16, 16), (12, 20)):
        image = torch.randn(2, dim, *grid)
        close(program.module()(image), module(image))


def test_a_compiled_layer_takes_another_grid():
    """Its second grid is of symbols."""
    layer = build_scrambled("linformer", DIM)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for grid in ((4, 6), (6, 5), (16, 16)):
        x = tokens(grid, 2, DIM)
        close(compiled(x, grid), layer(x, grid))


@pytest.mark.skipif(not dispatch._KNOWS_EXPORT, reason="every compilation may be an export's")
def test_a_compiler_takes_gradients_of_our_own():
    compiled = torch.compile(lambda x: x + dispatch.loses_gradients(), backend="eager")
    assert compiled(torch.zeros(())) == 0
