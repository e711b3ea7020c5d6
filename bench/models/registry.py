"""The models of published size, and what each of them runs."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from flax import nnx

from bench.models import llama, pair, parts, resnet50, unet, vit

Size = Literal["real", "tiny"]
Which = Literal["training step", "forward", "decode"]

# Dtypes of activations; parameters are float32. Tiny models serve for comparisons.
DTYPES: dict[Size, str] = {"real": "bfloat16", "tiny": "float32"}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, and one of its uses.

    Attributes:
      name: name of the model.
      which: what is run: `run` with a step of gradient descent on its result, or `run`
        alone.
      build: makes the model from a configuration, a dtype and `nnx.Rngs`.
      inputs: makes examples from a configuration, a batch, a dtype and `nnx.Rngs`.
      run: computes the loss or the outputs from the model and the inputs. In "decode",
        the last input is a cache, and the result is the outputs and the next cache.
      sizes: configuration of each size.
      batch: batch of each size.
    """

    name: str
    which: Which
    build: Callable[[Any, Any, nnx.Rngs], nnx.Module]
    inputs: Callable[[Any, int, Any, nnx.Rngs], tuple[Any, ...]]
    run: Callable[..., Any]
    sizes: dict[Size, Any]
    batch: dict[Size, int]

    def __str__(self) -> str:
        return f"{self.name}, {self.which}"

    def model(self, size: Size, dtype: str) -> nnx.Module:
        """Builds the model with random weights, the same each time."""
        return self.build(self.sizes[size], dtype, nnx.Rngs(0))

    def examples(self, size: Size, dtype: str) -> tuple[Any, ...]:
        """Draws random inputs, the same each time."""
        return self.inputs(self.sizes[size], self.batch[size], dtype, nnx.Rngs(1))


_LLAMA: dict[str, Any] = {
    "name": "llama",
    "build": llama.Llama,
    "sizes": {"real": llama.REAL, "tiny": llama.TINY},
}
_UNET: dict[str, Any] = {
    "name": "unet",
    "build": unet.UNet,
    "sizes": {"real": unet.REAL, "tiny": unet.TINY},
}

WORKLOADS = (
    Workload(
        name="resnet50",
        which="training step",
        build=resnet50.ResNet,
        inputs=parts.labelled_images,
        run=parts.classification_loss,
        sizes={"real": resnet50.REAL, "tiny": resnet50.TINY},
        batch={"real": 64, "tiny": 32},
    ),
    Workload(
        name="vit",
        which="training step",
        build=vit.ViT,
        inputs=parts.labelled_images,
        run=parts.classification_loss,
        sizes={"real": vit.REAL, "tiny": vit.TINY},
        batch={"real": 64, "tiny": 4},
    ),
    Workload(
        which="training step",
        inputs=llama.inputs,
        run=llama.loss,
        batch={"real": 4, "tiny": 2},
        **_LLAMA,
    ),
    Workload(
        which="decode",
        inputs=llama.decode_inputs,
        run=llama.decode,
        batch={"real": 8, "tiny": 2},
        **_LLAMA,
    ),
    Workload(
        which="forward",
        inputs=unet.inputs,
        run=unet.forward,
        batch={"real": 2, "tiny": 2},
        **_UNET,
    ),
    Workload(
        which="training step",
        inputs=unet.training_inputs,
        run=unet.loss,
        batch={"real": 4, "tiny": 2},
        **_UNET,
    ),
    Workload(
        name="pair",
        which="training step",
        build=pair.PairStack,
        inputs=pair.inputs,
        run=pair.loss,
        sizes={"real": pair.REAL, "tiny": pair.TINY},
        batch={"real": 1, "tiny": 1},
    ),
)
