"""Device memory that a compiled function needs, as its compiler reports it."""

from typing import Any


def beside_arguments(compiled: Any) -> int:
    """Returns bytes of results and temporaries, without those aliased to arguments.

    Args:
      compiled: the result of `jax.stages.Lowered.compile`.
    """
    found = compiled.memory_analysis()
    taken = found.output_size_in_bytes + found.temp_size_in_bytes
    return int(taken - found.alias_size_in_bytes)


def with_arguments(compiled: Any) -> int:
    """Returns bytes of arguments, results and temporaries; aliased ones count once."""
    arguments = compiled.memory_analysis().argument_size_in_bytes
    return int(arguments) + beside_arguments(compiled)
