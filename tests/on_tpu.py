"""Interprets the TPU's kernels; see tests/interpreters.py."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from fusednorm.kernels import tpu
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.tpu import memory
from tests.interpreters import interpret


@dataclasses.dataclass(frozen=True)
class Device:
    """Attributes of a jax device that `plan` reads."""

    device_kind: str
    num_cores: int = 1


def store_bits(ref: Any, here: Any, bits: Any) -> None:
    """Replaces memory.store_bits, which the interpreter lacks: converts the value.

    The result is the same.
    """
    ref[here] = lax.bitcast_convert_type(bits, jnp.float16)


@contextlib.contextmanager
def mode() -> Iterator[None]:
    """Interprets the kernels that run in it, and raises if one had a race."""
    cores = memory.chip(None).cores  # as many as the plan assumes
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)
    try:
        with (
            pltpu.force_tpu_interpret_mode(params),
            mock.patch.object(memory, "store_bits", store_bits),
        ):
            yield
        races = interpret_pallas_call.races
        assert races is None or not races.races_found, "the interpreter saw a race"
    finally:
        # Without the reset, a failure would break the next test too.
        pltpu.reset_tpu_interpret_mode_state()


def plan(call: Call, device: Any) -> Kernel | Fallback:
    return interpret(tpu.plan, mode, call)
