"""Class-conditional diffusion backbones behind one interface: `(x, t, y) -> prediction`.

x (N, C, H, W): noisy input
t (N,): time
y (N,): labels in 0..num_classes, where num_classes is the null label

The prediction is (N, C_out, H, W), with C_out = 2C if the network also learns the variance.
Classifiers of noisy images, `(x, t) -> logits`, are built in the same way.
"""

from torch import nn

from backbones import (  # noqa: F401  (importing a family registers it)
    adm,
    adm_classifier,
    dic,
    dico,
    diffussm,
    dig,
    dim,
    dimr,
    dimsum,
    dis,
    dit,
    dydit,
    flowdcn,
    hourglass,
    isotropic,
    ldm,
    lightningdit,
    sit,
    terdit,
    udit,
    uvit,
)
from backbones.checkpoint import load_judged, load_published, print_warning
from backbones.judgement import check_progress, check_values, convert_stored
from backbones.mixers import MIXERS, register_mixer
from backbones.registry import (
    Exceptions,
    build,
    exceptions_of,
    guided_channels_of,
    list_backbones,
    list_classifiers,
    options_of,
    register,
    registered_networks,
    shared_name_of,
    tiny_options_of,
)


def registered_classes() -> dict[str, type[nn.Module]]:
    """Return the class behind every name of a network, a classifier or a mixer."""
    return registered_networks() | {f"mixer {name}": cls for name, cls in MIXERS.items()}


__all__ = [
    "Exceptions",
    "build",
    "exceptions_of",
    "guided_channels_of",
    "list_backbones",
    "list_classifiers",
    "check_progress",
    "check_values",
    "convert_stored",
    "load_judged",
    "load_published",
    "options_of",
    "print_warning",
    "register",
    "register_mixer",
    "registered_classes",
    "shared_name_of",
    "tiny_options_of",
]
