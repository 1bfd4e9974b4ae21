"""Class-conditional diffusion backbones behind one interface: `(x, t, y) -> prediction`.

x (N, C, H, W) noisy input, t (N,) time, y (N,) labels in 0..num_classes (num_classes is the null label)
-> (N, C_out, H, W), with C_out = 2C where the variance is learned. Classifiers of noisy images, `(x, t) -> logits`, are built alike.
"""

from backbones import (  # noqa: F401  (importing a family registers it)
    adm,
    adm_classifier,
    dic,
    dico,
    diffussm,
    dig,
    dim,
    dimsum,
    dis,
    dit,
    hourglass,
    isotropic,
    ldm,
    sit,
    udit,
    uvit,
)
from backbones.checkpoint import load_published
from backbones.registry import (
    build,
    guided_channels_of,
    list_backbones,
    list_classifiers,
    options_of,
    register,
    tiny_options_of,
)

__all__ = [
    "build",
    "guided_channels_of",
    "list_backbones",
    "list_classifiers",
    "load_published",
    "options_of",
    "register",
    "tiny_options_of",
]
