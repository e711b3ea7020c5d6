"""Models on plain flax.nnx, which know nothing of fusednorm.

small.py      a transformer and a ResNet, and scikit-learn's digits to train them on
registry.py   the models of published size, and what is run of each
resnet50.py, vit.py, llama.py, unet.py, pair.py
              these models, of random weights
parts.py      what several of them are built of
"""
