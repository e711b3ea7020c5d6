"""python -m bench: times this machine; roofline and scaling predict other chips.

`models` times whole models. `compare` and `report` read the files of earlier runs.
"""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "roofline": "bench.aot.roofline",
    "scaling": "bench.aot.scaling",
    "compare": "bench.compare",
    "report": "bench.publish",
    "models": "bench.whole_run",
    "peers": "bench.peers_run",
    "tune": "bench.tune",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for.

    Args:
      arguments: command-line arguments; None takes those of sys.argv.

    Returns:
      The exit code.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    module = "bench.run"
    if given and given[0] in COMMANDS:
        module = COMMANDS[given.pop(0)]
    # On demand: a command's environment may lack what another one imports.
    code: int = importlib.import_module(module).main(given)
    return code


if __name__ == "__main__":
    sys.exit(main())
