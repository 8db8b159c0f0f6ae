"""One family of SSM layers a module: how it reads a system off a mixer, and how a smaller state is made of it."""

from .contracts import Layer, MixerInputs, Realization, ResizeParameter, new_data
from .engines import Engine, Sizes, check_engine, engine_remarks, engine_sizes, register_engine
from .mamba2 import keeping_maps
from .mixer import MixerLayer
from .parameters import ParameterCut, set_data_
from .registry import find_layers, is_plain, plain_model, realization_of, realize, register, register_realization
from .resizing import make_room_, resize_like_, size_in

__all__ = [
    "Engine",
    "Layer",
    "MixerInputs",
    "MixerLayer",
    "ParameterCut",
    "Realization",
    "ResizeParameter",
    "Sizes",
    "check_engine",
    "engine_remarks",
    "engine_sizes",
    "find_layers",
    "is_plain",
    "keeping_maps",
    "make_room_",
    "new_data",
    "plain_model",
    "realization_of",
    "realize",
    "register",
    "register_engine",
    "register_realization",
    "resize_like_",
    "set_data_",
    "size_in",
]
