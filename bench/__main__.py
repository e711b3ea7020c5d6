"""python -m bench: times this machine; roofline and scaling predict other chips.

`models` times whole models. `compare` and `report` read the files of earlier runs.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for.

    Args:
      arguments: command-line arguments; None takes those of sys.argv.

    Returns:
      The exit code.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    # Import on demand: a command's environment may lack what another one imports.
    if given[:1] == ["roofline"]:
        from bench.aot.roofline import main as roofline

        return roofline(given[1:])
    if given[:1] == ["scaling"]:
        from bench.aot.scaling import main as scaling

        return scaling(given[1:])
    if given[:1] == ["compare"]:
        from bench.compare import main as compare

        return compare(given[1:])
    if given[:1] == ["report"]:
        from bench.publish import main as report

        return report(given[1:])
    if given[:1] == ["models"]:
        from bench.whole_run import main as models

        return models(given[1:])
    if given[:1] == ["tune"]:
        from bench.tune import main as tune

        return tune(given[1:])
    from bench.run import main as run

    if given[:1] == ["peers"]:
        return run(given[1:], with_peers=True)
    return run(given)


if __name__ == "__main__":
    sys.exit(main())
