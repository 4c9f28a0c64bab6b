"""Zero-shot CLIP."""

from clip_min import SEVEN, Method


class ZeroShot(Method):
    """Zero-shot CLIP; with `seven_templates` those of Tip-Adapter for ImageNet, as in FG-VPL's tables."""

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, seven_templates=False):
        super().__init__(clip, classnames, SEVEN if seven_templates else templates)
