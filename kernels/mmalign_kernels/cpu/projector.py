"""Projector and first RMSNorm: the norm by csrc/cpu/rms_norm.cpp."""

from functools import partial

from ..reference import projector as reference
from .rms_norm import rms_norm_bwd, rms_norm_fwd

project_image_features_fwd = partial(
    reference.project_image_features_fwd, rms_norm_fwd=rms_norm_fwd
)
project_image_features_bwd = partial(
    reference.project_image_features_bwd, rms_norm_bwd=rms_norm_bwd
)
