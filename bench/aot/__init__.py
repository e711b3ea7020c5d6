"""Figures of the kernels on chips that are not here: compiled, not run.

    python -m bench roofline        # what `make roofline` runs
    python -m bench scaling         # what `make scaling` runs
    python -m bench roofline --help

This needs jax's CUDA plugin and libtpu beside a CPU jax; `make aot` installs both.

    chips.py      the chips, and the devices that jax compiles for
    compile.py    compiles a function for a chip: HLO, registers and spills
    traffic.py    bytes that a kernel moves, counted from its jaxpr
    walk.py       evaluates the integers of a kernel's jaxpr, for all blocks at once
    schedule.py   cycles of a TPU kernel, counted in its compiled schedule
    hlo.py        kernels and bytes of compiled HLO: flax's, and XLA's around ours
    measure.py    one norm of one shape on one chip: all of the above
    whole.py      whole layers and a model, ours and flax's
    sharded.py    layers on several devices, and the bytes that cross between them
    gate.py       the recorded figures that `make aot` compares with, and its limits
    roofline.py   tables and JSON of all cases
    chart.py      a chip's roofline, as a PNG
    scaling.py    tables and JSON of the traffic between 8, 64 and 256 devices
"""
