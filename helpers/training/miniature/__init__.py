"""falcon-mini, the Falcon small enough to ship: what it is trained on, how, and how good it is.

``recipe`` describes the settings in env/models/falcon-mini/recipe.yaml. ``texts`` reads the public data sets, ``talk``
makes conversations from them and from simple facts, ``training`` makes the tokenizer and the two checkpoints,
``quality`` measures them, and ``card`` writes the model card.
"""
