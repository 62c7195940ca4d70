"""falcon-mini, the Falcon small enough to ship: what it is trained on, and how.

``texts`` reads the public data sets, ``training`` makes the tokenizer and the two checkpoints. The settings stand in
``env/models/falcon-mini/recipe.yaml``.
"""
