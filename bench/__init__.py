"""The main job: fusednorm against flax.nnx, on real models, in one process.

    python -m bench                 # what `make bench` runs
    python -m bench --help

It trains two small models on scikit-learn's digits before and after `fusednorm.fuse`,
then times each case of `bench.cases`. What it finds is printed, and goes to a JSON file
and a chart.

    cases.py      the cases, named after real models, and the bytes they must move
    truth.py      float64 NumPy, and the gate: no figure for a wrong result
    contest.py    flax.nnx, fusednorm and others, compiled and timed in turn
    peers.py      the others: tokamax, PyTorch, Liger-Kernel, QuACK
    models/       models on plain flax.nnx: two small ones and their digits, and those
                  of published size
    training.py   the models' training, before and after `fuse`
    whole.py      whole models before and after `fuse`, and what compiling them takes
    whole_run.py  python -m bench models: picks them, runs them, reports
    suite.py      the pytest-benchmark items that run all this
    run.py        picks the cases, and runs the suite; python -m bench peers
    tune.py       python -m bench tune: other ways for GPU kernels to cut their work
    report.py     tables, JSON, chart
    compare.py    python -m bench compare: what moved between two runs
    publish.py    python -m bench report: the README's figures, from the JSON files
    memory.py     what a compiled function takes of a device's memory
    terminal.py   how the commands print
    provenance.py the commit that figures come from
    aot/          the kernels compiled for chips that are not here: `make aot`, and
                  python -m bench roofline, python -m bench scaling
"""
