"""Models on plain flax.nnx, which know nothing of fusednorm.

small.py      a transformer and a ResNet, and scikit-learn's digits to train them on
registry.py   the models of published size, and what each of them runs
resnet50.py, vit.py, llama.py, unet.py, pair.py
              the models of published size, with random weights
parts.py      parts that several of them share
"""
