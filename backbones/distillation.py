"""How Stable Diffusion's smaller U-Nets follow from larger ones: their start, and what they mimic.

Sources: BK-SDM (arXiv:2305.15798) and github.com/Nota-NetsPresso/BK-SDM at e13670c; KOALA
(arXiv:2312.04005), whose training code was never published: what is said of it here is a
reconstruction.

Of a level of the encoder, the student keeps the first residual blocks with their transformers; of a
level of the decoder, the first ones and the last, which alone fits the level's first skip. Of the
transformer blocks it keeps the first. It may lack the innermost levels and the middle.

Legend: r residual blocks of a level of the encoder. A level has r + 1 blocks in both arms: the
encoder's last one halves the grid, and the decoder's last one also doubles it.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from torch import Tensor, nn

from backbones.text_unet import TextUNet
from backbones.unet import SpatialTransformer

Pair = tuple[nn.Module, nn.Module]


class Mimicked(Enum):
    """Whose outputs a student is to match, beside the prediction."""

    # The hidden states after whole levels, as in BK-SDM.
    BLOCKS = "blocks"
    # The outputs of self-attention, as in KOALA; a reconstruction.
    SELF_ATTENTION = "self_attention"


def read_mimicked(name: str) -> Mimicked:
    """Return what a word names; ValueError that lists the known ones for another word."""
    known = {mimicked.value: mimicked for mimicked in Mimicked}
    if name not in known:
        raise ValueError(f"unknown features {name!r} of a teacher; known: {', '.join(known)}")
    return known[name]


def inherit_weights(student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    """Return the weights with which a student starts: those of the teacher's parts that it keeps.

    Raises:
        ValueError: the student does not follow from the teacher by removing parts.
    """
    student, teacher = _require_unets(student, teacher)
    places = dict(_kept_blocks(student, teacher))
    source = teacher.state_dict()

    # What is outside of the blocks has the same name in both.
    inherited = {}
    for name, weight in student.state_dict().items():
        arm, _, rest = name.partition(".")
        index, _, inner = rest.partition(".")
        block = f"{arm}.{index}"
        counterpart = f"{places[block]}.{inner}" if block in places else name
        if counterpart not in source or source[counterpart].shape != weight.shape:
            raise ValueError(
                f"the student's {name} of shape {tuple(weight.shape)} is no part of the teacher; "
                "give both the same widths, heads and text, and the student no more blocks"
            )
        inherited[name] = source[counterpart]
    return inherited


def mimicked_pairs(student: nn.Module, teacher: nn.Module, mimicked: Mimicked) -> list[Pair]:
    """Return the modules of a student whose outputs are to match those of the teacher's beside.

    Raises:
        ValueError: the student does not follow from the teacher by removing parts.
    """
    student, teacher = _require_unets(student, teacher)
    if mimicked is Mimicked.BLOCKS:
        return [*_levels_up(student, teacher), *_levels_down(student, teacher)]
    return list(_self_attentions(student, teacher))


def _require_unets(student: nn.Module, teacher: nn.Module) -> tuple[TextUNet, TextUNet]:
    """Return both; ValueError if one is another architecture, or the student is the larger one."""
    if not isinstance(student, TextUNet) or not isinstance(teacher, TextUNet):
        raise ValueError(
            "distillation is between U-Nets that read text, not from "
            f"{type(teacher).__name__} to {type(student).__name__}"
        )
    if student.num_res_blocks > teacher.num_res_blocks or len(student.depths) > len(teacher.depths):
        raise ValueError(
            f"a student of {len(student.depths)} levels with {student.num_res_blocks} blocks does "
            f"not follow from {len(teacher.depths)} levels with {teacher.num_res_blocks}; "
            "exchange student and teacher"
        )
    return student, teacher


def _kept_blocks(student: TextUNet, teacher: TextUNet) -> Iterator[tuple[str, str]]:
    """Yield the names of the student's blocks in both arms, with the teacher's that they were."""
    own, theirs = student.num_res_blocks, teacher.num_res_blocks
    levels = len(student.depths)
    removed = len(teacher.depths) - levels
    yield "input_blocks.0", "input_blocks.0"
    for level in range(levels):
        first, source = (own + 1) * level + 1, (theirs + 1) * level + 1
        for index in range(own):
            yield f"input_blocks.{first + index}", f"input_blocks.{source + index}"
        if level < levels - 1:
            yield f"input_blocks.{first + own}", f"input_blocks.{source + theirs}"

    # The innermost level comes first; the last block of a level stays its last.
    for level in range(levels):
        first, source = (own + 1) * level, (theirs + 1) * (level + removed)
        for index in range(own):
            yield f"output_blocks.{first + index}", f"output_blocks.{source + index}"
        yield f"output_blocks.{first + own}", f"output_blocks.{source + theirs}"


def _levels_up(student: TextUNet, teacher: TextUNet) -> Iterator[Pair]:
    """Yield what ends the levels of the decoder, the student's innermost level first."""
    own, theirs = student.num_res_blocks + 1, teacher.num_res_blocks + 1
    removed = len(teacher.depths) - len(student.depths)
    for level in range(1, len(student.depths) + 1):
        yield (
            _end(student.output_blocks[own * level - 1]),
            _end(teacher.output_blocks[theirs * (level + removed) - 1]),
        )


def _levels_down(student: TextUNet, teacher: TextUNet) -> Iterator[Pair]:
    """Yield what ends the levels of the encoder, after the grid is halved."""
    last = len(student.depths) - 1
    own, theirs = student.num_res_blocks + 1, teacher.num_res_blocks + 1
    for level in range(last):
        yield (
            _end(student.input_blocks[own * (level + 1)]),
            _end(teacher.input_blocks[theirs * (level + 1)]),
        )

    # A level that is innermost in the student alone ends before its transformer's residual.
    pair = (
        _end(student.input_blocks[own * last + own - 1]),
        _end(teacher.input_blocks[theirs * last + theirs - 1]),
    )
    if len(teacher.depths) > len(student.depths):
        own_end, their_end = pair
        if isinstance(own_end, SpatialTransformer) and isinstance(their_end, SpatialTransformer):
            pair = (own_end.proj_out, their_end.proj_out)
    yield pair


def _self_attentions(student: TextUNet, teacher: TextUNet) -> Iterator[Pair]:
    """Yield the self-attentions of the student's transformer blocks and the teacher's they were."""
    names = list(_kept_blocks(student, teacher))
    if len(student.middle_block) and len(teacher.middle_block):
        names.append(("middle_block", "middle_block"))
    for own, theirs in names:
        pairs = zip(
            _attentions(student.get_submodule(own)),
            _attentions(teacher.get_submodule(theirs)),
            strict=False,  # the first ones stay
        )
        yield from pairs


def _attentions(block: nn.Module) -> Iterator[nn.Module]:
    for name, module in block.named_modules():
        if name.endswith("attn1"):
            yield module


def _end(block: nn.Module) -> nn.Module:
    """Return the last layer of a block, whose output is the block's."""
    *_, last = block.children()
    return last
