"""Other libraries on the same blocks and the same arrays, each where it is installed.

    tokamax         for JAX: LayerNorm and RMSNorm (its Triton kernel on a GPU)
    cudnn           flax's LayerNorm, which XLA turns into cuDNN's
    torch           PyTorch's own operations, one after the other
    torch.compile   the same operations, compiled as one
    liger           Liger-Kernel: RMSNorm, LayerNorm, GroupNorm, add + RMSNorm
    quack           QuACK: RMSNorm, LayerNorm, add + RMSNorm

Dtypes: x, y and their gradients have the case's dtype in every library. Parameters are
float32 for flax, fusednorm, tokamax, Liger and QuACK, and for PyTorch's BatchNorm.
PyTorch's other norms accept only parameters of x's dtype.

Layout: arrays keep JAX's, channels last. PyTorch sees them through DLPack, without a
copy. An operation that needs another layout makes its own copy, which its time
includes: Liger's GroupNorm needs channels first.
"""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from bench import contest
from bench.cases import Block, Case
from bench.contest import Named, Peer, said

Tensor = Any  # a torch.Tensor
# A norm in PyTorch. It takes the layer, x, scale and bias.
TorchNorm = Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]


class UnsupportedError(ValueError):
    """The peer does not have the block."""


def present(names: Sequence[str]) -> tuple[list[Peer], dict[str, str]]:
    """Returns the named peers that can run here, and why the others cannot."""
    found, absent = [], {}
    for name in names:
        try:
            found.append(PEERS[name]())
        except Exception as error:  # importing runs another library's code
            absent[name] = said(error)
    return found, absent


def versions() -> dict[str, str]:
    """Returns the versions of the peers' libraries that are installed."""
    found = {}
    libraries = ("tokamax", "torch", "triton", "liger-kernel", "quack-kernels")
    for name in (*libraries, "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- JAX ------------------------------------------------------------------------------


class _TokamaxNorm(nnx.Module):
    """A flax layer's parameters with tokamax's function."""

    def __init__(self, layer: Any, function: Callable[..., jax.Array]):
        self.scale, self.bias = layer.scale, getattr(layer, "bias", None)
        self.epsilon = layer.epsilon
        self.function = function
        self.center = isinstance(layer, nnx.LayerNorm)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (p if p is None else p[...] for p in (self.scale, self.bias))
        return self.function(
            x, scale, bias, epsilon=self.epsilon, subtract_mean=self.center
        )


class _OfJax:
    """Base of the peers that run in JAX."""

    def read(self, found: Named) -> Named:
        """Implements `bench.contest.Peer`."""
        return found


class Tokamax(_OfJax):
    """tokamax.layer_norm in place of flax's layer."""

    name = "tokamax"

    def __init__(self) -> None:
        import tokamax

        on_gpu = jax.default_backend() == "gpu"
        self._function = functools.partial(
            tokamax.layer_norm, implementation="triton" if on_gpu else "xla"
        )

    def passes(
        self,
        block: Block,
        inputs: tuple[Any, ...],
        cotangents: Named,
        wanted: Iterable[str],
    ) -> dict[str, Callable[[], Any]]:
        """Implements `bench.contest.Peer`."""
        if not isinstance(block.norm, nnx.LayerNorm | nnx.RMSNorm):
            raise UnsupportedError(f"no {type(block.norm).__name__}")
        if block.case.modulated:
            raise UnsupportedError("no norm without a scale")
        mine = nnx.clone(block)
        mine.norm = _TokamaxNorm(block.norm, self._function)
        return dict(contest.passes(mine, inputs, cotangents, wanted))


class Cudnn(_OfJax):
    """flax's layer, with its normalization left to cuDNN by XLA."""

    name = "cudnn"
    options: ClassVar = {"xla_gpu_enable_cudnn_layer_norm": True}

    def __init__(self) -> None:
        if jax.default_backend() != "gpu":
            raise RuntimeError("its kernels are for GPUs")

    def passes(
        self,
        block: Block,
        inputs: tuple[Any, ...],
        cotangents: Named,
        wanted: Iterable[str],
    ) -> dict[str, Callable[[], Any]]:
        """Implements `bench.contest.Peer`."""
        if not isinstance(block.norm, nnx.LayerNorm):
            raise UnsupportedError(f"no {type(block.norm).__name__}")
        found: dict[str, Callable[[], Any]] = {}
        passes = contest.passes(self.prepared(block), inputs, cotangents, wanted)
        for which, one in passes.items():
            found[which] = by_cudnn = dataclasses.replace(one, options=self.options)
            if "__cudnn$norm" not in by_cudnn.compiled.as_text():
                raise UnsupportedError(f"XLA does not leave it to cuDNN: {which}")
        return found

    @staticmethod
    def prepared(block: Block) -> Block:
        """Sets the variance to the form XLA looks for: the mean of centred squares."""
        mine = nnx.clone(block)
        mine.norm.use_fast_variance = False
        return mine


# --- PyTorch --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Torch:
    """A block in PyTorch, around one library's norms.

    Attributes:
      name: the peer's name.
      norm: the library's norm for a layer; raises `UnsupportedError` if it has none.
      add_norm: the library's fused add of two tensors and RMSNorm of the sum, which
        returns (y, h); or None.
      compiles: whether torch.compile compiles the block as one.
      wide_params: whether parameters stay float32.
    """

    name: str
    norm: TorchNorm
    add_norm: Callable[..., tuple[Tensor, Tensor]] | None = None
    compiles: bool = False
    wide_params: bool = True

    def passes(
        self,
        block: Block,
        inputs: tuple[Any, ...],
        cotangents: Named,
        wanted: Iterable[str],
    ) -> dict[str, Callable[[], Any]]:
        """Implements `bench.contest.Peer`."""
        import torch

        case, layer = block.case, block.norm
        if case.conv is not None:
            raise UnsupportedError("no convolution")
        leaves = _leaves(case, layer, inputs, self.wide_params)
        ones = {name: _tensor(a) for name, a in cotangents.items()}

        def function(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
            return _block(case, layer, self.norm, self.add_norm, leaves)

        if self.compiles:
            import torch._functorch.config as functorch

            functorch.donated_buffer = False  # "backward" reuses the kept tensors
            function = torch.compile(function, dynamic=False)

        def gradients(outputs: dict[str, Tensor], keep: bool = False) -> Named:
            names = [name for name, a in leaves.items() if a.requires_grad]
            found = torch.autograd.grad(
                list(outputs.values()),
                [leaves[name] for name in names],
                [ones[name] for name in outputs],
                retain_graph=keep,
            )
            return {f"d{n}": a for n, a in zip(names, found, strict=True)}

        @torch.no_grad()
        def forward() -> Named:
            return function(leaves)

        def forward_backward() -> Named:
            outputs = function(leaves)
            return {n: a.detach() for n, a in outputs.items()} | gradients(outputs)

        def forward_with_statistics() -> tuple[Named, None]:
            return {n: a.detach() for n, a in function(leaves).items()}, None

        runs: dict[str, Callable[[], Any]] = {
            "forward": forward,
            "forward+backward": forward_backward,
            "forward with statistics": forward_with_statistics,
        }
        if "backward" in wanted:
            kept = function(leaves)
            runs["backward"] = lambda: gradients(kept, keep=True)
        return {which: _finished(runs[which]) for which in wanted}

    def read(self, found: Named) -> Named:
        """Implements `bench.contest.Peer`."""
        tensors = {name: a.detach().contiguous() for name, a in found.items()}
        return {name: jnp.from_dlpack(a) for name, a in tensors.items()}


def _tensor(a: jax.Array) -> Tensor:
    import torch

    return torch.from_dlpack(a)


def _leaves(
    case: Case, layer: Any, inputs: tuple[Any, ...], wide_params: bool
) -> dict[str, Tensor]:
    """Returns the block's tensors by name; those with their own gradient require it."""
    x, *others = inputs
    found = {"x": x}
    if case.residual is not None:
        found["residual"] = others[0]
    if case.modulated:
        found |= {"scale": others[0], "bias": others[1]}
    for name in ("scale", "bias"):
        param = getattr(layer, name, None)
        if param is not None:
            wide = wide_params or isinstance(layer, nnx.BatchNorm)
            found[name] = param[...].astype(jnp.float32 if wide else case.dtype)
    tensors = {name: _tensor(a) for name, a in found.items()}
    for name, tensor in tensors.items():  # before the norm, dresidual equals dx
        tensor.requires_grad_(name != "residual" or case.residual == "after")
    return tensors


def _block(
    case: Case,
    layer: Any,
    norm: TorchNorm,
    add_norm: Callable[..., tuple[Tensor, Tensor]] | None,
    leaves: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Computes `bench.cases.Block` on PyTorch's tensors."""
    from torch.nn import functional

    x, scale, bias = leaves["x"], leaves.get("scale"), leaves.get("bias")
    residual = leaves.get("residual")
    if case.residual == "before":
        if add_norm is not None:
            if not isinstance(layer, nnx.RMSNorm):
                raise UnsupportedError("a sum before RMSNorm alone")
            y, h = add_norm(layer, x, residual, scale)
        else:
            h = x + residual
            y = norm(layer, h, scale, bias)
        return {"h": h, "y": y}
    if case.modulated:
        y = norm(layer, x, None, None) * (1 + leaves["scale"]) + leaves["bias"]
    else:
        y = norm(layer, x, scale, bias)
    if residual is not None:
        y = y + residual
    match case.activation:
        case "relu":
            y = functional.relu(y)
        case "silu":
            y = functional.silu(y)
    return {"y": y}


def _finished(run: Callable[[], Any]) -> Callable[[], Any]:
    """Wraps a function so that its work is done when it returns."""
    import torch

    def finished() -> Any:
        found = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return found

    return finished


def _native(layer: Any, x: Tensor, scale: Any, bias: Any) -> Tensor:
    """Computes a layer's norm with torch.nn.functional."""
    from torch.nn import functional

    features, epsilon = x.shape[-1:], layer.epsilon
    match layer:
        case nnx.LayerNorm():
            return functional.layer_norm(x, features, scale, bias, epsilon)
        case nnx.RMSNorm():
            return functional.rms_norm(x, features, scale, epsilon)
    channels_first = x.movedim(-1, 1)
    match layer:
        case nnx.BatchNorm():
            running = (_tensor(a[...]) for a in (layer.mean, layer.var))
            y = functional.batch_norm(
                channels_first,
                *(a.clone() for a in running),
                scale,
                bias,
                training=True,
                momentum=1 - float(layer.momentum),
                eps=epsilon,
            )
        case nnx.InstanceNorm():
            y = functional.instance_norm(
                channels_first, weight=scale, bias=bias, eps=epsilon
            )
        case nnx.GroupNorm():
            groups = layer.num_groups
            y = functional.group_norm(channels_first, groups, scale, bias, epsilon)
    return y.movedim(1, -1)


def _torch(compiles: bool) -> Torch:
    import torch  # noqa: F401

    name = "torch.compile" if compiles else "torch"
    return Torch(name, _native, compiles=compiles, wide_params=False)


def _liger() -> Torch:
    from liger_kernel.ops import fused_add_rms_norm, group_norm, layer_norm, rms_norm

    _require_gpu()

    def norm(layer: Any, x: Tensor, scale: Any, bias: Any) -> Tensor:
        if scale is None:
            raise UnsupportedError("no norm without a scale")
        rows = x.reshape(-1, x.shape[-1])
        match layer:
            case nnx.RMSNorm():
                of = rms_norm.LigerRMSNormFunction.apply
                y = of(rows, scale, layer.epsilon, 0.0, "llama", False)
                return y.reshape(x.shape)
            case nnx.LayerNorm():
                of = layer_norm.LigerLayerNormFunction.apply
                return of(rows, scale, bias, layer.epsilon).reshape(x.shape)
            case nnx.GroupNorm():
                of = group_norm.LigerGroupNormFunction.apply
                channels_first = x.movedim(-1, 1).contiguous()
                given = scale, bias, x.shape[-1], layer.num_groups, layer.epsilon
                return of(channels_first, *given).movedim(1, -1)
        raise UnsupportedError(f"no {type(layer).__name__}")

    def add_norm(layer: Any, x: Tensor, residual: Tensor, scale: Tensor) -> Any:
        of = fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply
        return of(x, residual, scale, layer.epsilon, 0.0, "llama", False)

    return Torch("liger", norm, add_norm)


def _quack() -> Torch:
    import quack
    import torch
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    _require_gpu()

    class LayerNorm(torch.autograd.Function):  # joins QuACK's forward and backward
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, scale: Tensor, bias: Tensor, eps: float
        ) -> Any:
            y, rstd, mean = layernorm_fwd(x, scale, bias, eps, True, True)
            ctx.save_for_backward(x, scale, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, scale, rstd, mean = ctx.saved_tensors
            return *layernorm_bwd(x, scale, dy, rstd, mean), None

    def norm(layer: Any, x: Tensor, scale: Any, bias: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        match layer:
            case nnx.RMSNorm():
                return quack.rmsnorm(x, scale, eps=layer.epsilon)
            case nnx.LayerNorm() if scale is not None:
                return LayerNorm.apply(rows, scale, bias, layer.epsilon).reshape(
                    x.shape
                )
        raise UnsupportedError(f"no such {type(layer).__name__}")

    def add_norm(layer: Any, x: Tensor, residual: Tensor, scale: Tensor) -> Any:
        return quack.rmsnorm(
            x, scale, residual=residual, eps=layer.epsilon, prenorm=True
        )

    return Torch("quack", norm, add_norm)


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("its kernels are for GPUs")


PEERS: dict[str, Callable[[], Any]] = {
    "tokamax": Tokamax,
    "cudnn": Cudnn,
    "torch": functools.partial(_torch, compiles=False),
    "torch.compile": functools.partial(_torch, compiles=True),
    "liger": _liger,
    "quack": _quack,
}
