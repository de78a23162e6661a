"""The shared backbone: a class-conditional diffusion transformer (DiT, arXiv 2212.09748)."""

from __future__ import annotations

import contextlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    get_2d_sincos_pos_embed_from_grid,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from attnzoo import InvalidType, InvalidValue
from attnzoo.contract import Attention, as_tuples, check_option, nearest
from attnzoo.ops.dispatch import is_transformed
from attnzoo.ops.precision import operand_dtype
from backbones.attention_backend import reset_backend, set_backend
from backbones.carried import import_carried
from backbones.feedforward import FeedForward, build_feedforward
from backbones.offload import check_group_offload, check_loaded, read_without_call
from backbones.pattern import canonical_pattern, names_in, parse_pattern


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition (adaLN-Zero)."""

    def __init__(
        self, dim: int, attention: Attention, feedforward: FeedForward, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.modulation = AdaLayerNormZero(dim)
        self.attention = attention
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=norm_eps)
        self.feedforward = feedforward

    def forward(
        self, x: Tensor, condition: Tensor, grid: tuple[int, int], time: Tensor | None = None
    ) -> Tensor:
        """Tokens (b, n, dim), condition (b, dim) and time (b,) -> tokens (b, n, dim)."""
        modulated, gate, shift_ff, scale_ff, gate_ff = self.modulation(x, emb=condition)
        attended = self.attention(modulated, grid)
        _check_result(self.attention, attended, x)
        x = torch.addcmul(x, gate[:, None], attended)
        modulated = torch.addcmul(shift_ff[:, None], self.norm(x), 1 + scale_ff[:, None])
        x = torch.addcmul(x, gate_ff[:, None], self.feedforward(modulated, grid, time))
        result = self.attention.after_block(x, grid)
        if result is not x:
            _check_result(self.attention, result, x)
        return result


def _check_result(attention: Attention, result: Any, x: Tensor) -> None:
    """Refuses, by the mechanism's name, what would train to the end or fail in another layer."""
    if not isinstance(result, Tensor):
        raise TypeError(
            f"attention {attention.name!r} returned a {type(result).__name__}: a mechanism "
            f"returns tokens alone, (batch, height * width, dim)"
        )
    if result.shape != x.shape:  # which might broadcast
        raise ValueError(
            f"attention {attention.name!r} returned tokens of {tuple(result.shape)} for tokens "
            f"of {tuple(x.shape)}: a mechanism keeps the shape"
        )
    if result.device != x.device:
        raise ValueError(
            f"attention {attention.name!r} returned tokens on {result.device} for tokens on "
            f"{x.device}: a mechanism keeps the device"
        )
    if result.dtype is not x.dtype:  # narrower ones are widened, and autocast narrows some
        own = operand_dtype(x)
        if torch.promote_types(own, operand_dtype(result)) is not own:
            raise TypeError(
                f"attention {attention.name!r} returned tokens of {result.dtype} for tokens of "
                f"{x.dtype}: return them as .to(x.dtype)"
            )


class Blocks(nn.ModuleList):
    """A ``ModuleList`` whose modules are known to be blocks."""

    def __iter__(self) -> Iterator[Block]:
        return cast(Iterator[Block], super().__iter__())


class DiT(ModelMixin, ConfigMixin):
    """Diffusion transformer whose attention is any mechanism of the zoo.

    Use ``build_backbone`` for the sizes and presets.

    Args:
        attn: Name of a registered mechanism, or a pattern of several over the blocks, such as
            "sana*3+softmax"; see ``backbones.pattern``.
        attn_options: Its options; those of a pattern by mechanism.
        dim: Width of the tokens.
        depth: Number of blocks.
        num_heads: Heads of the attention, for a pattern also by mechanism; None takes the
            mechanism's own default.
        feedforward: "mlp", "mix-ffn", "swiglu", "diffmoe" or "time-experts".
        feedforward_ratio: Hidden width of the feed-forward over ``dim``.
        patch_size: Side of a patch, in pixels of the model's input.
        in_channels: Channels of the input.
        learn_sigma: Whether the output also holds the variance, doubling its channels.
        num_classes: Classes; index ``num_classes`` is the null class of guidance.
        position: "sincos" adds 2-D sine-cosine positions, "none" adds nothing.
        sample_size: Side of the input it was made for; other sizes work too.
        norm_eps: Of the norm before the feed-forward; 1e-5 in diffusers' DiT.
        frequency_shift: The 128 frequencies of the time fall from 1 by equal factors to 1e-4 times
            one factor more (0, DiT) or to 1e-4 (1, diffusers' DiT).
        provenance: Where the numbers come from; saved in the config, not used.

    Raises:
        InvalidValue: An argument is out of range or a name is unknown.
        InvalidType: An argument has a wrong type, or the mechanism lacks one of the options.
    """

    # The parts that ``macs_parts`` knows, by the name of the module that computes them.
    PARTS: ClassVar[dict[str, str]] = {
        "patch_embedding": "embedding",
        "timestep_embedding": "embedding",
        "class_embedding": "embedding",
        "modulation": "modulation",
        "feedforward": "feed-forward",
        "final_norm": "modulation",
        "final_projection": "final",
    }
    config: Any  # diffusers gives a dict whose entries are attributes too
    blocks: Blocks
    _last_positions: tuple[Any, Tensor] | None = None
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - diffusers reads it as a class attribute
    _repeated_blocks = ["Block"]  # noqa: RUF012 - likewise

    @register_to_config
    def __init__(
        self,
        attn: str = "dydila",
        attn_options: dict[str, Any] | None = None,
        dim: int = 384,
        depth: int = 9,
        num_heads: int | dict[str, Any] | None = None,
        feedforward: str = "mlp",
        feedforward_ratio: float = 4.0,
        patch_size: int = 2,
        in_channels: int = 4,
        learn_sigma: bool = False,
        num_classes: int = 1000,
        position: str = "sincos",
        sample_size: int = 32,
        norm_eps: float = 1e-6,
        frequency_shift: int = 0,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        hints = typing.get_type_hints(DiT.__init__)
        for name, value in self.config.items():
            if name in hints:
                check_option(name, value, hints[name])
        pattern = parse_pattern(attn)
        # A config file holds a tuple as a list, which would then differ from what was given.
        options = as_tuples(attn_options, in_words=True)
        self.register_to_config(attn=pattern.text, attn_options=options)
        for name, value in (
            ("dim", dim),
            ("depth", depth),
            ("patch_size", patch_size),
            ("in_channels", in_channels),
            ("num_classes", num_classes),
            ("sample_size", sample_size),
        ):
            if value < 1:
                raise InvalidValue(f"{name} must be at least 1, got {value}")
        pattern.check()
        pattern.check_depth(depth)
        if norm_eps <= 0 or frequency_shift not in (0, 1):
            raise InvalidValue(
                f"norm_eps={norm_eps} must be above 0 and frequency_shift={frequency_shift} 0 or 1"
            )
        if position not in ("sincos", "none"):
            raise InvalidValue(f"position={position!r} is not valid; choose 'sincos' or 'none'")
        if position == "sincos" and dim % 4:
            raise InvalidValue(f"dim={dim} must be a multiple of 4 for 2-D sine-cosine positions")
        self.patch_embedding = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.timestep_frequencies = Timesteps(
            256, flip_sin_to_cos=True, downscale_freq_shift=frequency_shift
        )
        self.timestep_embedding = TimestepEmbedding(256, dim)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.blocks = Blocks(
            Block(
                dim,
                pattern.build(index, dim, num_heads, depth, attn_options),
                build_feedforward(feedforward, dim, feedforward_ratio, index, depth),
                norm_eps,
            )
            for index in range(depth)
        )
        self.final_norm = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        out_channels = in_channels * (2 if learn_sigma else 1)
        self.final_projection = nn.Linear(dim, patch_size**2 * out_channels)
        self.gradient_checkpointing = False
        for name, parameter in self.named_parameters():
            if is_lazy(parameter):
                raise TypeError(
                    f"{name} is made in the first forward, too late to be trained: a mechanism "
                    f"makes its parameters in __init__, where self.dim is known"
                )
        self._initialize()

    def _initialize(self) -> None:
        """DiT's initialization; attention and feed-forward have initialized themselves."""
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        biased: list[nn.Linear | nn.Conv2d] = [self.patch_embedding]
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        for layer in (self.timestep_embedding.linear_1, self.timestep_embedding.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
            biased.append(layer)
        # Every block starts as the identity, and the first output is 0.
        zeroed = [self.final_norm.linear, self.final_projection]
        zeroed += [block.modulation.linear for block in self.blocks]
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
        for layer in (*biased, *zeroed):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None
    ) -> None:
        """Stores no activations inside blocks; backward computes them again.

        Statistics, auxiliary losses and whatever else a block's forward leaves in its modules
        are those of one forward, as without.

        Args:
            gradient_checkpointing_func: Called as ``func(block, x, condition, grid, time)``
                instead of ``torch.utils.checkpoint``; what it leaves is its own affair.
        """
        super().enable_gradient_checkpointing(gradient_checkpointing_func or _checkpoint)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts the diffusion target.

        Args:
            hidden_states: Noisy images or latents, (b, in_channels, height, width).
            timestep: Time of each sample, (b,), or one for all.
            class_labels: Classes, (b,), int64 or int32; ``num_classes`` is the null class, and so
                is 1000, by which diffusers' ``DiTPipeline`` calls it, for a model of fewer.
            return_dict: Whether to return an output object rather than a tuple.

        Returns:
            ``.sample``: (b, in_channels or twice that, height, width).

        Raises:
            InvalidType: The labels are no tensor, or the time no number.
            InvalidValue: A shape does not fit, or a label or time is out of range.
        """
        if hidden_states.ndim != 4:
            raise InvalidValue(
                f"expected an input of shape (batch, {self.config.in_channels}, height, width), "
                f"got {tuple(hidden_states.shape)}"
            )
        if hasattr(self.patch_embedding, "_hf_hook"):  # accelerate's
            check_loaded(self.blocks)
        batch, _, height, width = hidden_states.shape
        grid = self.token_grid(height, width)
        timestep = as_times(timestep, hidden_states.device)
        if timestep.ndim > 1 or (timestep.ndim and timestep.shape[0] not in (batch, 1)):
            raise InvalidValue(
                f"timestep must be one number, or one for each of {batch} inputs, got a tensor of "
                f"{tuple(timestep.shape)}"
            )
        timestep = timestep.expand(batch)
        self._check_labels(class_labels)
        if self.config.num_classes < _NULL_OF_DIFFUSERS:
            is_null = class_labels == _NULL_OF_DIFFUSERS
            class_labels = torch.where(is_null, self.config.num_classes, class_labels)
        self._check_condition(hidden_states, timestep, class_labels)
        # Contiguous, else every norm copies; and inductor's norm is wrong on a CPU (torch 2.13).
        x = rearrange(self.patch_embedding(hidden_states), "b c h w -> b (h w) c").contiguous()
        if self.config.position == "sincos":
            x = x + self._positions(x, grid)
        frequencies = self.timestep_frequencies(timestep).to(x.dtype)
        condition = self.timestep_embedding(frequencies) + self.class_embedding(class_labels)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                assert self._gradient_checkpointing_func is not None
                x = self._gradient_checkpointing_func(block, x, condition, grid, timestep)
            else:
                x = block(x, condition, grid, timestep)
        x = self.final_projection(self.final_norm(x, condition))
        sample = rearrange(
            x,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=grid[0],
            p=self.config.patch_size,
            q=self.config.patch_size,
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in tokens of an input of ``height`` x ``width``.

        Raises:
            InvalidValue: The patch does not divide the input.
        """
        patch = self.config.patch_size
        if height < 1 or width < 1 or height % patch or width % patch:
            fits = [max(patch, round(side / patch) * patch) for side in (height, width)]
            raise InvalidValue(
                f"an input of {height}x{width} does not divide into patches of {patch}x{patch}; "
                f"the nearest that does is {fits[0]}x{fits[1]}"
            )
        return height // patch, width // patch

    def macs_parts(
        self,
        grid: tuple[int, int],
        attention: Callable[[Attention, tuple[int, int]], dict[str, int]] | None = None,
    ) -> dict[str, dict[str, int]]:
        """Multiply-accumulates of one forward per sample, by block and part.

        Args:
            grid: (height, width) in tokens.
            attention: Gives an attention layer's parts; None asks the layer itself.

        Returns:
            For each block ("blocks.0", ...) and each module around them, its parts.

        Raises:
            InvalidType: The mechanism gives no closed form.
        """
        n, dim = grid[0] * grid[1], self.class_embedding.embedding_dim
        embedding = self.timestep_embedding
        parts = {
            "patch_embedding": {"embedding": self.patch_embedding.weight.numel() * n},
            "timestep_embedding": {
                "embedding": embedding.linear_1.weight.numel() + embedding.linear_2.weight.numel()
            },
            "class_embedding": {"embedding": 0},
        }
        for index, block in enumerate(self.blocks):
            layer = block.attention
            own = attention(layer, grid) if attention else layer.macs_parts(grid)
            parts[f"blocks.{index}"] = {
                **own,
                "feed-forward": block.feedforward.macs(grid),
                "modulation": 6 * dim**2,
            }
        parts["final_norm"] = {"modulation": 2 * dim**2}
        parts["final_projection"] = {"final": self.final_projection.weight.numel() * n}
        return parts

    def _positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The positions for tokens ``x``, of twenty launches; cached for the last size."""
        if _is_traced(x):
            return _sincos_positions(x.shape[-1], grid, x.device).to(x.dtype)
        key, last = (grid, x.device, x.dtype), self._last_positions
        if last is None or last[0] != key:
            with torch.inference_mode(False):  # whose tensors no later training could use
                last = key, _sincos_positions(x.shape[-1], grid, x.device).to(x.dtype)
            # What a recording computes is there after its first replay only.
            if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._last_positions = last
        return last[1]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_last_positions"}

    @staticmethod
    def _check_labels(labels: Tensor) -> None:
        if not isinstance(labels, Tensor):
            raise InvalidType(f"class_labels must be a tensor of integers, got {labels!r}")
        if labels.dtype not in (torch.int64, torch.int32):  # an embedding takes no others
            raise InvalidValue(
                f"class_labels must be of int64 or int32, got {labels.dtype}; give labels.long()"
            )

    def _check_condition(self, x: Tensor, timestep: Tensor, labels: Tensor) -> None:
        if x.shape[1] != self.config.in_channels:
            raise InvalidValue(
                f"expected {self.config.in_channels} channels, got an input of {tuple(x.shape)}"
            )
        if labels.shape != x.shape[:1]:
            raise InvalidValue(
                f"class_labels must be {x.shape[0]} integers, got {tuple(labels.shape)}"
            )
        # On a GPU these looks at values would stall the queue; the recipes look before.
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or not labels.numel():
            return
        if is_transformed():  # vmap has no one number to look at
            return
        if int(labels.min()) < 0 or int(labels.max()) > self.config.num_classes:
            raise InvalidValue(
                f"class labels must lie in [0, {self.config.num_classes}] "
                f"({self.config.num_classes} is the null class), "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        is_host = timestep.device.type == "cpu"
        if is_host and not bool(((timestep >= 0) & timestep.isfinite()).all()):
            raise InvalidValue(f"timesteps must be finite and at least 0, got {timestep.tolist()}")

    def set_attention_backend(self, backend: str) -> None:
        """Computes every softmax by "native" (PyTorch), "flash" or "xformers", as of diffusers.

        Raises:
            InvalidValue: There is no such backend, or the mechanism has no softmax.
            Unavailable: The package is missing or does not run here.
        """
        set_backend(self, backend)

    def reset_attention_backend(self) -> None:
        """Undoes ``set_attention_backend``: the option ``impl`` decides again."""
        reset_backend(self)

    def set_use_memory_efficient_attention_xformers(
        self, valid: bool, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """``set_attention_backend("xformers")`` or its undoing, as of diffusers.

        Raises:
            InvalidValue: See there; or an ``attention_op`` is given, which nothing takes.
        """
        if attention_op is not None:
            raise InvalidValue("attention_op is not taken: xformers chooses its operator itself")
        set_backend(self, "xformers") if valid else reset_backend(self)

    @property
    def _skip_layerwise_casting_patterns(self) -> list[str]:  # pyright: ignore
        return [f"^{re.escape(name)}$" for name in read_without_call(self)]

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """See diffusers' ``ModelMixin``.

        Raises:
            InvalidValue: Weights would not be there when they are read.
        """
        call = inspect.signature(super().enable_group_offload).bind(*args, **kwargs)
        check_group_offload(self, call.arguments.get("offload_type"))
        super().enable_group_offload(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _ABSENT:  # an AttributeError too, so that who asks first is answered no
            raise NoAttribute(f"a DiT of attnzoo has no {name}: {_ABSENT[name]}")
        return super().__getattr__(name)

    def register_to_config(self, **kwargs: Any) -> None:
        """See diffusers' ``ConfigMixin``; ``config.out_channels`` is there, and is not saved."""
        # It takes arguments without a name for defaults, which ``from_config`` then leaves out.
        kwargs.pop("_use_default_values", None)
        super().register_to_config(**kwargs)
        channels = self.config.get("in_channels"), self.config.get("learn_sigma")
        if isinstance(channels[0], int):
            vars(self.config)["out_channels"] = channels[0] * (2 if channels[1] else 1)

    def fuse(self) -> DiT:
        """Folds training-only structure (re-parameterised convolutions) in place.

        The eval-mode output stays the same; the config follows, so that the fused model can be
        saved and loaded.

        Returns:
            The model itself.
        """
        pattern = parse_pattern(self.config.attn)
        options = pattern.options_of(self.config.attn_options)
        changed = False
        for index, block in enumerate(self.blocks):
            folded = block.attention.fuse()
            options[pattern.name_of(index)] |= folded
            changed = changed or bool(folded)
        if changed:
            flat = options if pattern.is_mixture else options[pattern.text]
            self.register_to_config(attn_options=flat)
        return self

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:
        """Loads a saved model; see diffusers' ``ModelMixin.from_pretrained``.

        Args:
            folder: A folder, or a repository of the hub.
            **kwargs: What diffusers takes, all of which holds for every file that is read;
                ``trust_remote_code``, without which no mechanism's code beside the weights is
                run; and arguments of the model that replace those of the config.

        Raises:
            InvalidType: An argument, or an entry of the config, that the model does not have.
            InvalidValue: The config or the weights are missing or damaged (an OSError too), belong
                to another mechanism, or do not fit.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        is_trusted = kwargs.pop("trust_remote_code", False)
        try:
            # It ignores what concerns the weights only.
            saved = cls._saved_attention(folder, cls.load_config(folder, **kwargs))
            wanted = kwargs.get("attn", saved)
            if canonical_pattern(wanted) != canonical_pattern(saved):
                raise InvalidValue(
                    f"{folder} holds the weights of attention {saved!r}, not of {wanted!r}; "
                    f"leave attn out to load what is there"
                )
            import_carried(names_in(saved), folder, kwargs, is_trusted=is_trusted)
            loaded: Any = super().from_pretrained(folder, output_loading_info=True, **kwargs)
            model, info = loaded
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise CannotLoad(f"cannot load a DiT from {folder}: {reason}") from error
        except (ValueError, RuntimeError) as error:
            if any(said in str(error) for said in ("expected shape", "size mismatch")):
                reason = " ".join(str(error).split())
                raise InvalidValue(
                    f"the weights in {folder} do not fit its config: {reason}"
                ) from error
            raise
        if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise InvalidValue(f"the weights in {folder} do not fit its config: {info}")
        return (model, info) if wants_info else model

    @classmethod
    def _saved_attention(cls, folder: Any, config: Any) -> str:
        if not isinstance(config, dict):
            raise InvalidValue(f"the config in {folder} is no JSON object")
        if not isinstance(config.get("attn"), str):
            raise InvalidValue(
                f"the config in {folder} names no attention, but attn={config.get('attn')!r}: "
                f"it is of a {config.get('_class_name')}"
            )
        return config["attn"]

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """See diffusers' ``ConfigMixin``; an entry that the model does not have is refused."""
        known = [*inspect.signature(cls.__init__).parameters][1:]
        for name in (*config_dict, *kwargs):
            if name not in known and not name.startswith("_") and name not in _OF_DIFFUSERS:
                raise InvalidType(
                    f"{cls.__name__} has no option {name!r}{nearest(name, known)} "
                    f"It takes: {', '.join(known)}"
                )
        return super().extract_init_dict(config_dict, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["attn"] = self.config.attn

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads weights; those of another mechanism raise InvalidValue even where shapes agree."""
        saved = getattr(state_dict, "_metadata", {}).get("", {}).get("attn", self.config.attn)
        if saved != self.config.attn:
            raise InvalidValue(
                f"these are the weights of attention {saved!r}, "
                f"this model has attention {self.config.attn!r}"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)


class NoAttribute(InvalidType, AttributeError):
    """What diffusers' models may have and this one has not."""


_NULL_OF_DIFFUSERS = 1000  # the null class of ImageNet
_PROCESSORS = "a mechanism computes itself, by its option impl or set_attention_backend"
_PROJECTIONS = "each mechanism computes in one product what it can, without being asked"
_ABSENT = {
    "attn_processors": _PROCESSORS,
    "set_attn_processor": _PROCESSORS,
    "set_default_attn_processor": _PROCESSORS,
    "fuse_qkv_projections": _PROJECTIONS,
    "unfuse_qkv_projections": _PROJECTIONS,
}


class CannotLoad(InvalidValue, OSError):
    """A saved model that is missing or damaged."""


# What diffusers adds to a config, or hands on beside it.
_OF_DIFFUSERS = ("quantization_config", "dtype", "torch_dtype")


def as_times(timestep: Any, device: torch.device | None = None) -> Tensor:
    """Times as a tensor.

    Raises:
        InvalidType: They are no real numbers.
    """
    times = timestep
    if not isinstance(timestep, (Tensor, float, int)):
        try:
            times = torch.as_tensor(timestep)
        except (TypeError, ValueError, RuntimeError):
            times = None
    if times is None or (isinstance(times, Tensor) and times.is_complex()):
        raise InvalidType(f"timestep must be a number or a tensor of numbers, got {timestep!r}")
    return torch.as_tensor(times, device=device)


def _checkpoint(block: nn.Module, *args: Any) -> Any:
    if torch.compiler.is_compiling():  # the compiler repeats products, not what a forward leaves
        return checkpoint(block, *args, use_reentrant=False)

    recomputation = _Recomputation(block)
    return checkpoint(
        block,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), recomputation),
    )


class _Recomputation:
    """A block's forward once more: from the buffers it had, and leaving no trace in its modules.

    A context that can be entered for every backward of a graph that is retained.
    """

    def __init__(self, block: nn.Module) -> None:
        self._modules = list(block.modules())
        self._start = [
            {name: None if z is None else z.detach().clone() for name, z in m._buffers.items()}
            for m in self._modules
        ]

    def __enter__(self) -> None:
        self._after = [(dict(vars(m)), dict(m._buffers)) for m in self._modules]
        for module, start in zip(self._modules, self._start, strict=True):
            for name, buffer in start.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    def __exit__(self, *_: Any) -> None:
        for module, (attributes, buffers) in zip(self._modules, self._after, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _is_traced(x: Tensor) -> bool:
    """Whether a tensor may be a stand-in, whose results must not be used again."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or bool(torch._C._get_tracing_state())
        or is_transformed()
        or type(x) is not Tensor
    )


def _sincos_positions(dim: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """2-D sine-cosine positions of an h x w grid at unit spacing, (h * w, dim)."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in grid)
    mesh = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
    return get_2d_sincos_pos_embed_from_grid(dim, mesh, output_type="pt")
