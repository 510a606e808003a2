"""ccmim_fast: pretrain timm vision transformers with ccMIM (ICLR 2023)."""

__version__ = "0.1.0"
