"""hf_compressm: smaller SSM states for Hugging Face Mamba models, guided by Hankel singular values."""
