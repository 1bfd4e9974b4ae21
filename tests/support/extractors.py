from __future__ import annotations

import numpy as np


class Grey:
    """An extractor of a few sums over the pixels.

    pool (N, 6), spatial (N, 5), probabilities (N, 4).
    """

    sha256 = "0" * 64
    name = "inception"
    warnings = ()
    layers = ("pool", "spatial", "probabilities")

    def features(self, batches):
        for batch in batches:
            mix = np.random.default_rng(0)
            weights = [mix.standard_normal((batch[0].size, width)) / 500 for width in (6, 5, 4)]
            pool, spatial, logits = (
                batch.reshape(len(batch), -1).astype(np.float32) @ w.astype(np.float32)
                for w in weights
            )
            p = np.exp(logits)
            yield pool, spatial, p / p.sum(1, keepdims=True)
