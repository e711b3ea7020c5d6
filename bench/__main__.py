"""python -m bench: times what is here; roofline and scaling are of what is not."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for.

    Args:
      arguments: of the command line; None is sys.argv's.

    Returns:
      The exit code.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    # Each lives in an environment of its own, without what the other imports.
    if given[:1] == ["roofline"]:
        from bench.aot.roofline import main as roofline

        return roofline(given[1:])
    if given[:1] == ["scaling"]:
        from bench.aot.scaling import main as scaling

        return scaling(given[1:])
    from bench.run import main as run

    return run(given)


if __name__ == "__main__":
    sys.exit(main())
