"""falcon-mini, the Falcon small enough to ship: what it is trained on, how, and how good it is.

``texts`` reads the public data sets, ``talk`` makes conversations of them and of simple facts, ``training`` makes the
tokenizer and the two checkpoints, ``quality`` measures them, ``card`` writes the model card. The settings stand in
env/models/falcon-mini/recipe.yaml.
"""
