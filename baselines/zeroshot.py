"""Zero-shot CLIP as a method of its own, for the first row of every table.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, arXiv:2103.00020,
Section 3.1. Everything stands in clip_min.Method. To use it elsewhere, copy this file, clip_min.py and
assets/bpe_merges.txt.gz.
"""

from clip_min import SEVEN, Method


class ZeroShot(Method):
    """Zero-shot CLIP. With `seven_templates` it reads those of Tip-Adapter for ImageNet, as in FG-VPL's tables."""

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, seven_templates=False):
        super().__init__(clip, classnames, SEVEN if seven_templates else templates)
