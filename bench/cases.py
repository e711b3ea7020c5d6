"""The cases that are timed: norms of real models, and the blocks around them."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import fusednorm

_ACTIVATIONS = {"relu": nnx.relu, "silu": nnx.silu}


@dataclasses.dataclass(frozen=True)
class Case:
    """One block of one model.

    Attributes:
      name: the model, and the place in it.
      norm: class of the norm layer, with flax's defaults: GroupNorm has 32 groups.
      sample: shape of the norm's input without its first axis. That axis is as long as
        the wanted size allows.
      dtype: dtype of x, y and the computation; parameters are float32.
      conv: input channels of a 1x1 convolution that produces x, or None for no
        convolution.
      residual: where a second input is added: before the norm, after it, or nowhere.
      activation: activation at the end of the block, if any.
      modulated: whether scale and bias are inputs, one of each per sample, as in a
        diffusion transformer (adaLN): norm(x) * (1 + scale) + bias.
      samples: fixed length of the first axis; None derives it from the wanted size.
    """

    name: str
    norm: Any
    sample: tuple[int, ...]
    dtype: str
    conv: int | None = None
    residual: Literal["before", "after"] | None = None
    activation: Literal["relu", "silu"] | None = None
    modulated: bool = False
    samples: int | None = None

    def shape(self, tensor_bytes: float) -> tuple[int, ...]:
        """Returns the shape of the norm's input: at least one sample.

        The block's largest tensor has about `tensor_bytes` bytes.
        """
        fitting = max(1, round(tensor_bytes / self.sample_bytes))
        return (self.samples or fitting, *self.sample)

    @property
    def sample_bytes(self) -> int:
        """Bytes per sample of the block's largest tensor."""
        *pixels, channels = self.sample
        widest = max(channels, self.conv or 0)
        return math.prod(pixels) * widest * jnp.dtype(self.dtype).itemsize

    @property
    def layer(self) -> str:
        """Description of the block: "GroupNorm + silu"."""
        parts = [
            "conv" if self.conv is not None else "",
            "add" if self.residual == "before" else "",
            self.norm.__name__,
            "modulate" if self.modulated else "",
            "add" if self.residual == "after" else "",
            self.activation or "",
        ]
        return " + ".join(filter(None, parts))

    @property
    def floor(self) -> tuple[int, int] | None:
        """Tensors of x's size that must cross device memory, forward and backward.

        | block              | forward                | backward                     |
        |--------------------|------------------------|------------------------------|
        | any norm but Batch | x -> y               2 | x, dy -> dx                3 |
        | BatchNorm          | x, then x -> y       3 | x, dy, then x, dy -> dx    5 |
        | add + norm         | x, r -> h, y         4 | h, dh, dy -> dx = dr       4 |
        | BatchNorm + add    | x, then x, r -> y    4 | x, dy, y -> dr,            7 |
        | + relu             |                        | then x, dr -> dx             |

        A row, or one group or channel of a sample, can stay on the chip from its
        statistics to its normalization, so it is read once. A batch cannot, and is read
        twice. An activation costs nothing, forward or backward: it is recomputed from
        x. Scale, bias, statistics and their gradients are not counted: they are below
        4 % of the total. A block with a convolution is bound by arithmetic and has no
        floor: None.
        """
        if self.conv is not None:
            return None
        reads = 2 if self.norm is nnx.BatchNorm else 1
        forward, backward = reads + 1, 2 * reads + 1
        if self.residual == "before":
            return forward + 2, backward + 1
        if self.residual == "after":
            return forward + 1, backward + 2
        return forward, backward


class Block(nnx.Module):
    """A case's layers: convolution, residual, norm, residual, activation."""

    def __init__(self, case: Case, rngs: nnx.Rngs):
        channels = case.sample[-1]
        if case.conv is not None:
            self.conv = nnx.Conv(
                case.conv,
                channels,
                kernel_size=(1, 1),
                use_bias=False,
                dtype=jnp.dtype(case.dtype),
                rngs=rngs,
            )
        params = {"use_scale": False, "use_bias": False} if case.modulated else {}
        self.norm = case.norm(
            channels, dtype=jnp.dtype(case.dtype), rngs=rngs, **params
        )
        # Random parameters, as after some training. With ones and zeros, a kernel that
        # ignores them would pass.
        if self.norm.scale is not None:
            self.norm.scale[...] = jax.random.uniform(rngs(), (channels,), minval=0.5)
        if getattr(self.norm, "bias", None) is not None:
            self.norm.bias[...] = jax.random.normal(rngs(), (channels,))
        self.case = case

    def _norm_is_ours(self) -> bool:
        """Says whether the norm can compute its neighbours itself."""
        return isinstance(self.norm, getattr(fusednorm, self.case.norm.__name__))

    def __call__(self, x: jax.Array, *others: jax.Array) -> dict[str, jax.Array]:
        """Returns y, and also the sum h if a residual is added before the norm.

        Args:
          x: the input.
          others: the residual, or scale and bias, if the case has them.
        """
        if self.case.conv is not None:
            x = self.conv(x)
        if self._norm_is_ours():
            return self._by_norm(x, *others)
        if self.case.residual == "before":
            h = x + others[0]
            return {"h": h, "y": self.norm(h)}
        y = self.norm(x)
        if self.case.modulated:
            scale, bias = others
            y = y * (1 + scale) + bias
        if self.case.residual == "after":
            y = y + others[0]
        if self.case.activation is not None:
            y = _ACTIVATIONS[self.case.activation](y)
        return {"y": y}

    def _by_norm(self, x: jax.Array, *others: jax.Array) -> dict[str, jax.Array]:
        """Computes everything after the convolution in one call of the norm."""
        options: dict[str, Any] = {}
        if self.case.activation is not None:
            options["activation"] = self.case.activation
        if self.case.modulated:
            scale, bias = others
            options |= {"scale": scale, "bias": bias, "scale_offset": 1.0}
        if self.case.residual is not None:
            options["residual"] = others[0]
        if self.case.residual == "before":
            y, h = self.norm(x, **options)
            return {"h": h, "y": y}
        return {"y": self.norm(x, **options)}


def draw(
    case: Case, tensor_bytes: float, seed: int = 0
) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
    """Draws inputs of the case's block and cotangents of its outputs, all O(1).

    Returns:
      inputs: x, whose mean is not 0; then the residual, or per-sample scale and bias,
        if the case has them.
      cotangents: by the names of the block's outputs.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 5))
    shape = case.shape(tensor_bytes)

    def normal(shape: tuple[int, ...], mean: float = 0.0) -> jax.Array:
        return (jax.random.normal(next(keys), shape) + mean).astype(case.dtype)

    channels = case.sample[-1] if case.conv is None else case.conv
    inputs: tuple[Any, ...] = (normal((*shape[:-1], channels), mean=0.5),)
    if case.residual is not None:
        inputs = (*inputs, normal(shape))
    if case.modulated:
        ones = (1,) * (len(shape) - 2)
        of_samples = (shape[0], *ones, shape[-1])
        inputs = (*inputs, normal(of_samples), normal(of_samples))
    outputs = ("h", "y") if case.residual == "before" else ("y",)
    return inputs, {name: normal(shape) for name in outputs}


def chosen(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Returns the names that match any of the patterns."""
    return [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


CASES = (
    # Rows. AlphaFold's pair representation of 384 residues; ViT-B/16 on 224x224 pixels.
    Case("alphafold_pair_64", nnx.LayerNorm, (384, 64), "bfloat16"),
    Case("alphafold_pair_128", nnx.LayerNorm, (384, 128), "float32"),
    Case("vit_b_16", nnx.LayerNorm, (197, 768), "float32"),
    Case("gpt3_175b", nnx.LayerNorm, (12288,), "bfloat16"),
    Case("qwen3_qk_norm", nnx.RMSNorm, (32, 128), "bfloat16"),
    Case("llama3_1b", nnx.RMSNorm, (2048,), "float32"),
    Case("llama3_8b", nnx.RMSNorm, (4096,), "bfloat16"),
    Case("deepseek_v3", nnx.RMSNorm, (7168,), "bfloat16"),
    # ResNet-50: the end of each stage.
    Case("resnet50_conv2", nnx.BatchNorm, (56, 56, 256), "float32"),
    Case("resnet50_conv3", nnx.BatchNorm, (28, 28, 512), "bfloat16"),
    Case("resnet50_conv4", nnx.BatchNorm, (14, 14, 1024), "float32"),
    Case("resnet50_conv5", nnx.BatchNorm, (7, 7, 2048), "float32"),
    # Stable Diffusion's UNet: its four levels for an image of 512x512.
    Case("sd_unet_64", nnx.GroupNorm, (64, 64, 320), "float32"),
    Case("sd_unet_32", nnx.GroupNorm, (32, 32, 640), "bfloat16"),
    Case("sd_unet_16", nnx.GroupNorm, (16, 16, 1280), "float32"),
    Case("sd_unet_8", nnx.GroupNorm, (8, 8, 1280), "bfloat16"),
    # The decoder of its VAE, up to the image of 512x512.
    Case("sd_vae_512", nnx.GroupNorm, (512, 512, 128), "bfloat16"),
    Case("sd_vae_256", nnx.GroupNorm, (256, 256, 256), "bfloat16"),
    Case("sd_vae_128", nnx.GroupNorm, (128, 128, 512), "bfloat16"),
    Case("sd_vae_64", nnx.GroupNorm, (64, 64, 512), "float32"),
    # I2VGen-XL: a norm over 16 frames of 720x1280, at the first level of its UNet.
    Case("i2vgen_xl_90", nnx.GroupNorm, (16, 90, 160, 320), "bfloat16"),
    # Fast style transfer: first and innermost layers. CycleGAN: the first and the last.
    Case("style_256", nnx.InstanceNorm, (256, 256, 32), "float32"),
    Case("style_64", nnx.InstanceNorm, (64, 64, 128), "float32"),
    Case("cyclegan_256", nnx.InstanceNorm, (256, 256, 64), "bfloat16"),
    # Blocks: XLA fuses a norm with its neighbours.
    Case(
        "resnet50_conv_bn_relu",
        nnx.BatchNorm,
        (56, 56, 64),
        "float32",
        conv=256,
        activation="relu",
    ),
    Case(
        "resnet50_bn_add_relu",
        nnx.BatchNorm,
        (28, 28, 512),
        "float32",
        residual="after",
        activation="relu",
    ),
    Case(
        "sd_unet_gn_silu",
        nnx.GroupNorm,
        (32, 32, 640),
        "float32",
        activation="silu",
    ),
    Case("llama3_8b_add_rms", nnx.RMSNorm, (4096,), "bfloat16", residual="before"),
    # A diffusion transformer on latents of 256x256 pixels.
    Case("dit_xl_2_adaln", nnx.LayerNorm, (256, 1152), "bfloat16", modulated=True),
)

# Rows of every length, as libraries with row kernels time them.
SWEEP = tuple(
    Case(f"{name}_{features}_{short}", norm, (features,), dtype)
    for name, norm in (("rms", nnx.RMSNorm), ("layer", nnx.LayerNorm))
    for features in (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    for dtype, short in (("bfloat16", "bf16"), ("float32", "f32"))
)

# Work so small that the launch dominates: one token's decoding, few rows, one image.
FEW = (
    Case("decode_rms_4096", nnx.RMSNorm, (4096,), "bfloat16", samples=1),
    Case("decode_qk_norm", nnx.RMSNorm, (32, 128), "bfloat16", samples=1),
    Case("few_rows_768", nnx.LayerNorm, (768,), "float32", samples=37),
    Case("few_rows_12288", nnx.LayerNorm, (12288,), "bfloat16", samples=37),
    Case("one_sd_unet_64", nnx.GroupNorm, (64, 64, 320), "bfloat16", samples=1),
    Case("one_sd_unet_8", nnx.GroupNorm, (8, 8, 1280), "bfloat16", samples=1),
    Case("one_style_64", nnx.InstanceNorm, (64, 64, 128), "float32", samples=1),
    Case("few_resnet50_conv5", nnx.BatchNorm, (7, 7, 2048), "bfloat16", samples=4),
)
