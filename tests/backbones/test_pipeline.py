"""diffusers' pipelines, compiling of blocks, attention backends, and code beside the weights."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler
from torch import nn

import attnzoo
from attnzoo import InvalidType, InvalidValue
from attnzoo.errors import Unavailable
from attnzoo.registry import _REGISTRY, _SOURCES
from backbones import DiT, PixelDecoder, build_backbone
from backbones.carried import carry
from recipes.lab.diffusion import Diffusion, sample
from tests.backbones.weights import scrambled

TINY = {"dim": 16, "depth": 2, "num_classes": 10, "in_channels": 4, "sample_size": 4}
LABELS = [3, 7]


def tiny_vae():
    return scrambled(
        AutoencoderKL(
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=2, scaling_factor=0.5,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )  # fmt: skip


def pixels_of(pipe, labels=LABELS, **options):
    """Images of a pipeline without its bar, (n, c, h, w)."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(labels, output_type="pt", num_inference_steps=4, **options).images


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("kind", ["v_prediction", "learned sigma"])
def test_a_pipeline_gives_the_latents_of_our_sampler(kind, classes, monkeypatch):
    diffusion = Diffusion("epsilon", True) if kind == "learned sigma" else Diffusion()
    model = DiT("sana", **(TINY | {"num_classes": classes}), learn_sigma=diffusion.learn_sigma)
    pipe = DiTPipeline(scrambled(model), tiny_vae(), diffusion.scheduler("dpm++", 4))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(
        "diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: noise.clone()
    )
    rows = iter(noise.clone())
    monkeypatch.setattr("recipes.lab.diffusion.guidance.torch.randn", lambda *_, **__: next(rows))
    ours = sample(
        model, diffusion, labels=torch.tensor(LABELS), indices=torch.arange(2), seed=0,
        num_classes=classes, shape=(4, 4, 4), cfg=3.0, steps=4,
    )  # fmt: skip
    vae = pipe.vae
    with torch.no_grad():
        decoded = (vae.decode(ours / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    theirs = pixels_of(pipe, guidance_scale=3.0)
    assert theirs.shape == (2, 3, 8, 8)
    torch.testing.assert_close(theirs, decoded, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs, pixels_of(pipe, guidance_scale=1.0), atol=1e-4)


def test_a_pipeline_is_saved_and_loaded_and_makes_pictures(tmp_path):
    model = scrambled(DiT("dydila", **(TINY | {"in_channels": 1})))
    pipe = DiTPipeline(model, PixelDecoder(), DDIMScheduler(), {0: "zero", 3: "three, drei"})
    before = pixels_of(pipe, generator=torch.manual_seed(1))
    pipe.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is DiT and type(loaded.vae) is PixelDecoder
    assert torch.equal(pixels_of(loaded, generator=torch.manual_seed(1)), before)
    [image] = loaded([3], num_inference_steps=2).images
    assert image.size == (4, 4) and image.mode == "L"


def test_the_config_has_what_pipelines_read_and_saves_no_more(tmp_path):
    model = DiT("sana", **TINY, learn_sigma=True)
    assert model.config.out_channels == 8 and DiT("sana", **TINY).config.out_channels == 4
    model.save_pretrained(tmp_path)
    assert "out_channels" not in json.loads((tmp_path / "config.json").read_text())
    assert DiT.from_pretrained(tmp_path).config.out_channels == 8


def test_diffusers_null_class_is_ours_for_fewer_classes_only():
    model, x, t = scrambled(DiT("sana", **TINY)), torch.randn(1, 4, 4, 4), torch.tensor([5])
    null, theirs = (model(x, t, torch.tensor([label])).sample for label in (10, 1000))
    assert torch.equal(null, theirs)
    with pytest.raises(InvalidValue, match="got 999"):
        model(x, t, torch.tensor([999]))
    many = scrambled(DiT("sana", **(TINY | {"num_classes": 1001})))
    of_class, of_null = (many(x, t, torch.tensor([label])).sample for label in (1000, 1001))
    assert not torch.allclose(of_class, of_null)


def test_the_model_as_a_whole_goes_through_torch_func():
    model = scrambled(DiT("softmax", **TINY))
    x, t, labels = torch.randn(3, 4, 4, 4), torch.tensor([1, 5, 9]), torch.tensor([0, 1, 10])

    def one(x, t, label):
        return model(x[None], t[None], label[None]).sample[0]

    each = torch.func.vmap(one)(x, t, labels)
    with torch.no_grad():
        torch.testing.assert_close(each, model(x, t, labels).sample, rtol=1e-4, atol=1e-5)


def test_repeated_blocks_are_compiled():
    model = scrambled(DiT("dydila", **TINY))
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([1, 5]), torch.tensor([0, 10])
    with torch.no_grad():
        before = model(*inputs).sample
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        assert all(block._compiled_call_impl is not None for block in model.blocks)
        torch.testing.assert_close(model(*inputs).sample, before, rtol=1e-4, atol=1e-5)


SOFTMAX_LIKE = ["agent", "compressed", "linformer", "moh", "pvt", "softmax"]


@pytest.mark.parametrize("attn", attnzoo.list_attention())
def test_a_backend_is_taken_or_refused_by_name(attn, monkeypatch):
    model = scrambled(DiT(attn, **TINY))
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([1, 5]), torch.tensor([0, 10])
    with torch.no_grad():
        before = model(*inputs).sample
        if attn not in SOFTMAX_LIKE:
            with pytest.raises(InvalidValue, match=f"{attn!r} has no softmax"):
                model.set_attention_backend("native")
            return
        for missing in ("flash", "xformers"):
            with pytest.raises(Unavailable, match=missing):
                model.set_attention_backend(missing)
        calls = []

        def function(query, key, value):  # (b, n, h, d) each
            calls.append(query.shape)
            out = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (query, key, value)))
            return out.transpose(1, 2)

        monkeypatch.setattr("attnzoo.ops.softmax.libraries.load", lambda *_: function)
        model.set_attention_backend("flash")
        calls.clear()
        after = model(*inputs).sample
        assert len(calls) >= len(model.blocks)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
        model.set_attention_backend("native")
        model.reset_attention_backend()
        assert model.blocks[0].attention.config.impl == "auto"
        calls.clear()
        assert torch.equal(model(*inputs).sample, before) and not calls


def test_backends_of_mixtures_and_unknown_ones():
    mixture = DiT("sana+softmax", **TINY)
    mixture.set_attention_backend("native")
    assert [block.attention.config.impl for block in mixture.blocks] == ["auto", "torch"]
    with pytest.raises(InvalidValue, match="'sage' is none of native, flash, xformers"):
        mixture.set_attention_backend("sage")
    with pytest.raises(Unavailable, match="xformers"):
        mixture.enable_xformers_memory_efficient_attention()
    mixture.disable_xformers_memory_efficient_attention()
    assert mixture.blocks[1].attention.config.impl == "auto"


@pytest.mark.parametrize(
    "name",
    ["attn_processors", "set_attn_processor", "fuse_qkv_projections", "unfuse_qkv_projections"],
)
def test_what_diffusers_models_may_have_is_denied_with_a_reason(name):
    model = DiT("softmax", **TINY)
    assert not hasattr(model, name)
    with pytest.raises(InvalidType, match=f"no {name}: .*mechanism"):
        getattr(model, name)


MINE = """
import attnzoo
@attnzoo.register_attention("carried-mean")
class Mean(attnzoo.Attention):
    def forward(self, x, grid):
        return x.mean(1, keepdim=True).expand_as(x)
"""


@pytest.fixture
def mine(tmp_path):
    """Saves a model with a mechanism of its own, and the file of it, and forgets the mechanism."""
    known = dict(_REGISTRY), dict(_SOURCES)

    def forget():
        for now, then in zip((_REGISTRY, _SOURCES), known, strict=True):
            now.clear()
            now.update(then)

    def save(folder, text=MINE):
        file = tmp_path / "here" / "mine.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        attnzoo.import_mechanisms(file)
        DiT("carried-mean+sana", **TINY).save_pretrained(folder, variant="ema")
        assert carry(["carried-mean", "sana"], folder) == []
        forget()
        file.unlink()

    yield save
    forget()


def test_code_beside_the_weights_is_run_when_trusted_only(mine, tmp_path):
    mine(tmp_path / "out")
    with pytest.raises(InvalidValue, match=r"'carried-mean'.*mine.py.*trust_remote_code=True"):
        DiT.from_pretrained(tmp_path / "out", variant="ema")
    assert "carried-mean" not in attnzoo.list_attention()
    model = DiT.from_pretrained(tmp_path / "out", variant="ema", trust_remote_code=True)
    assert model.config.attn == "carried-mean+sana"
    assert attnzoo.source_of("carried-mean") == str(tmp_path / "out" / "mine.py")


def test_every_argument_of_the_hub_reaches_the_code_too(mine, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--somebody--dit"
    mine(repository / "snapshots" / ("1" * 40) / "inner")
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text("1" * 40)
    import huggingface_hub

    seen, download = [], huggingface_hub.hf_hub_download

    @functools.wraps(download)  # with its signature
    def recorded(repo, name, **options):
        seen.append((name, options))
        return download(repo, name, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", recorded)
    wanted = {
        "cache_dir": tmp_path / "hub", "local_files_only": True, "revision": "v2",
        "subfolder": "inner", "token": "secret", "force_download": False,
    }  # fmt: skip
    options = wanted | {"variant": "ema", "trust_remote_code": True}
    model = DiT.from_pretrained("somebody/dit", **options)
    assert model.config.attn == "carried-mean+sana"
    assert [name for name, _ in seen] == ["mechanisms.json", "mine.py"]
    assert all(options == wanted for _, options in seen)
    assert DiT.from_pretrained("somebody/dit", **options).config.attn == model.config.attn
    assert len(seen) == 2  # what is registered is not looked for


@pytest.mark.parametrize("index", ['{"carried-mean": "../mine.py"}', "[", '{"carried-mean": 3}'])
def test_a_damaged_index_is_named(mine, tmp_path, index):
    mine(tmp_path / "out")
    (tmp_path / "out" / "mechanisms.json").write_text(index)
    with pytest.raises(InvalidValue, match=r"mechanisms\.json in"):
        DiT.from_pretrained(tmp_path / "out", variant="ema", trust_remote_code=True)


def test_code_that_needs_its_neighbors_is_not_carried(mine, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "part.py").write_text("")
    with pytest.raises(InvalidValue, match=r"'carried-mean'.*imports 'part'.*one file"):
        mine(tmp_path / "out", "import part\n" + MINE)
    (tmp_path / "here" / "attnzoo").mkdir()  # as beside a file in the checkout
    mine(tmp_path / "out")


def test_an_unused_scheduler_of_the_preset_builder_works_too():
    model = build_backbone("sana", "tiny", resolution=32, latent_factor=8, num_classes=10)
    pipe = DiTPipeline(scrambled(model), tiny_vae(), DPMSolverMultistepScheduler())
    assert pixels_of(pipe).isfinite().all() and isinstance(pipe.transformer, nn.Module)
