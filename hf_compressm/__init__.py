"""hf_compressm: smaller SSM states for Hugging Face Mamba models, guided by Hankel singular values."""

from .callback import CompreSSMCallback
from .compress import compress_, compress_pretrained, hankel_singular_values
from .config import CompreSSMConfig
from .report import CompressionReport

__all__ = [
    "CompreSSMCallback",
    "CompreSSMConfig",
    "CompressionReport",
    "compress_",
    "compress_pretrained",
    "hankel_singular_values",
]
