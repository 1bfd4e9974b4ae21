"""Class-conditional diffusion backbones behind one interface: `(x, t, y) -> prediction`.

x (N, C, H, W): noisy input
t (N,): time
y (N,): labels or indices of captions in 0..num_classes, where num_classes is the null one

The prediction is (N, C_out, H, W), with C_out = 2C if the network also learns the variance.
Classifiers of noisy images, `(x, t) -> logits`, are built in the same way. So are the networks that
draw an image scale by scale, `(y, inputs) -> logits`, their tokenizers, and an autoencoder.
"""

from torch import nn

from backbones import (  # noqa: F401  (importing a family registers it)
    adm,
    adm_classifier,
    dic,
    dico,
    dico_text,
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
    mmdit,
    sit,
    terdit,
    text_unet,
    udit,
    uvit,
    uvit_text,
    var,
    vavae,
    vqvae,
)
from backbones.bert import Bert
from backbones.captions import CaptionTable, StoredStates, Text, TextNetwork, once_per_caption
from backbones.checkpoint import load_judged, load_published, print_warning, read_weights
from backbones.clip_text import ClipText
from backbones.distillation import (
    Mimicked,
    inherit_weights,
    mimicked_pairs,
    read_mimicked,
)
from backbones.fitting import Fit, Labels, fit, load_fitted
from backbones.judgement import check_progress, check_values, convert_stored
from backbones.mixers import MIXERS, register_mixer
from backbones.registry import (
    Exceptions,
    Kind,
    build,
    exceptions_of,
    guided_channels_of,
    kind_of,
    list_autoregressive,
    list_backbones,
    list_classifiers,
    list_tokenizers,
    options_of,
    register,
    registered_networks,
    require_kind,
    shared_name_of,
    tiny_options_of,
)
from backbones.vavae import PUBLISHED as PUBLISHED_AUTOENCODER
from backbones.words import Vocabulary


def registered_classes() -> dict[str, type[nn.Module]]:
    """Return the class behind every name of a network, a classifier or a mixer."""
    return registered_networks() | {f"mixer {name}": cls for name, cls in MIXERS.items()}


__all__ = [
    "CaptionTable",
    "ClipText",
    "StoredStates",
    "Text",
    "Mimicked",
    "inherit_weights",
    "mimicked_pairs",
    "read_mimicked",
    "TextNetwork",
    "Vocabulary",
    "once_per_caption",
    "Exceptions",
    "Fit",
    "Kind",
    "Labels",
    "PUBLISHED_AUTOENCODER",
    "build",
    "exceptions_of",
    "fit",
    "guided_channels_of",
    "kind_of",
    "list_autoregressive",
    "list_backbones",
    "list_classifiers",
    "list_tokenizers",
    "check_progress",
    "check_values",
    "convert_stored",
    "load_fitted",
    "load_judged",
    "load_published",
    "options_of",
    "print_warning",
    "read_weights",
    "register",
    "register_mixer",
    "registered_classes",
    "require_kind",
    "shared_name_of",
    "tiny_options_of",
]
