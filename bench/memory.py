"""What a compiled function takes of a device's memory, as its compiler says."""

from typing import Any


def beside_arguments(compiled: Any) -> int:
    """Bytes of results and of what is between, without what takes an argument's place.

    Args:
      compiled: of `jax.stages.Lowered.compile`.
    """
    found = compiled.memory_analysis()
    taken = found.output_size_in_bytes + found.temp_size_in_bytes
    return int(taken - found.alias_size_in_bytes)


def with_arguments(compiled: Any) -> int:
    """The same, and those of the arguments."""
    arguments = compiled.memory_analysis().argument_size_in_bytes
    return int(arguments) + beside_arguments(compiled)
