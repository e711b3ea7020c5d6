"""Benchmarks: fusednorm against flax.nnx, on real models, in one process.

    python -m bench                 # what `make bench` runs
    python -m bench --help

The main command trains two small models on scikit-learn's digits, before and after
`fusednorm.fuse`, then times each case of `bench.cases`. It prints the results and
writes them to a JSON file and a chart.

    cases.py      the cases, named after real models, and the bytes they must move
    truth.py      float64 references, and the gate: a wrong result gets no figure
    contest.py    compiles flax.nnx, fusednorm and others, and times them in turn
    peers.py      the others: tokamax, cuDNN, PyTorch, Liger-Kernel, QuACK
    models/       models on plain flax.nnx: two small ones with their digits, and
                  models of published size
    training.py   trains the small models before and after `fuse`
    whole.py      times whole models before and after `fuse`, and compiling them
    whole_run.py  python -m bench models: picks whole models, runs them, reports
    suite.py      the pytest-benchmark items of cases and small models
    run.py        picks the cases and runs the suite; also python -m bench peers
    tune.py       python -m bench tune: other ways for GPU kernels to cut their work
    report.py     tables, JSON, chart
    compare.py    python -m bench compare: what moved between two runs
    publish.py    python -m bench report: the README's figures, from the JSON files
    memory.py     device memory that a compiled function needs
    terminal.py   how the commands print
    provenance.py the commit and versions that figures come from
    aot/          the kernels compiled for chips that are not here: `make aot`,
                  python -m bench roofline, python -m bench scaling
"""
