"""The main job: fusednorm against flax.nnx, on real models, in one process.

    python -m bench                 # what `make bench` runs
    python -m bench --help

It trains two small models on scikit-learn's digits before and after `fusednorm.fuse`,
then times each case of `bench.cases`. What it finds is printed, and goes to a JSON file
and a chart.

    cases.py      the cases, named after real models, and the bytes they must move
    truth.py      float64 NumPy, and the gate: no figure for a wrong result
    contest.py    flax.nnx and fusednorm, compiled and timed in turn
    models.py     a transformer and a ResNet on plain flax.nnx, and the digits
    training.py   the models' training, before and after `fuse`
    suite.py      the pytest-benchmark items that run all this
    run.py        picks the cases, and runs the suite
    report.py     tables, JSON, chart
    provenance.py the commit that figures come from
    aot/          the kernels compiled for chips that are not here: `make aot`, and
                  python -m bench roofline, python -m bench scaling
"""
