"""A small training that predicts the tokens of a small tokenizer, on digits."""

from __future__ import annotations

from experiments.engine.specs.spec import Backbone, Data, Recipe, Tokenizer, Train

SIDES = (1, 2, 4)
TOKENS = dict(sides=SIDES, vocabulary=24, channels=6)
SMALL = dict(image_channels=1, ch=32, ch_mult=(1, 2), res_blocks=1)
TOKENIZER = Tokenizer(Backbone("vqvae_ch160", TOKENS | SMALL), steps=3, batch=6, revive_every=2)
NETWORK = Backbone("var_d16", TOKENS | dict(depth=2, dim=24, heads=3, num_classes=10))
DIGITS = Data("digits", size=8, channels=1, num_classes=10, split="held_out")
RECIPE = Recipe(steps=5, batch=7, lr=1e-2, ema=0.5, initial="by_name")
TRAIN = Train(NETWORK, DIGITS, RECIPE, tokenizer=TOKENIZER)
