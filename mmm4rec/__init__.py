"""mmm4rec: multi-modal Mamba-2 sequential recommendation, pre-trained once and moved into new domains."""

__version__ = "0.1.0"
