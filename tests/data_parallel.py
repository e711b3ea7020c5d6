"""Trains the benchmark's ResNet on a sharded batch, in one of several processes.

python -m tests.data_parallel PROCESSES PROCESS PORT RESULTS.npz
"""

import sys

import jax
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm
from bench.models.small import ResNet, digits

DEVICES, BATCH, STEPS = 8, 32, 4


def train() -> dict[str, np.ndarray]:
    """Returns each step's loss, and the final running statistics by name."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    model = ResNet(nnx.Rngs(0), channels=8)
    assert not fusednorm.fuse(model).left
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def place(array: jax.Array, spec: P) -> jax.Array:
        """Shards an array that every process holds whole: each keeps its own part."""
        whole, sharding = np.asarray(array), NamedSharding(mesh, spec)
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

    @jax.jit
    def step(params, rest, images, labels):  # type: ignore[no-untyped-def]
        def loss(params):  # type: ignore[no-untyped-def]
            model = nnx.merge(graph, params, rest, copy=True)
            logits = model(images)
            of_each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return of_each.mean(), nnx.state(model, nnx.Not(nnx.Param))

        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        return moved, rest, value

    with jax.set_mesh(mesh):
        params, rest = jax.tree.map(lambda a: place(a, P()), (params, rest))
        losses = []
        for _, (images, labels) in zip(range(STEPS), digits(BATCH), strict=False):
            batch = place(images, P("data")), place(labels, P("data"))
            params, rest, value = step(params, rest, *batch)
            losses.append(np.asarray(value))
    averages = nnx.to_flat_state(nnx.filter_state(rest, nnx.BatchStat))
    return {"losses": np.stack(losses)} | {
        "/".join(map(str, path)): np.asarray(variable[...])
        for path, variable in averages
    }


if __name__ == "__main__":
    processes, process, port = map(int, sys.argv[1:4])
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", processes, process, initialization_timeout=60
    )
    assert len(jax.local_devices()) == DEVICES // processes
    results = train()
    if process == 0:
        np.savez(sys.argv[4], **results)
    jax.distributed.shutdown()
