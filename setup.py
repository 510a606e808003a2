"""Package layout: `ccmim_fast` (the trainer), `ccmim_kernels` (the ops, usable alone) and the YAML presets.

There is no `kernels/__init__.py`: an import package named `kernels` would shadow Hugging Face's package of that name.
"""

from setuptools import find_packages, setup

# Lower bounds are what requirements/oldest.txt installs, which `make test ENV=oldest` tests; the exact versions CI runs
# are in requirements/current.txt.
INSTALL_REQUIRES = [
    "torch>=2.7.1",
    "torchvision>=0.22.1",
    # 1.0.26 reads the folders that `ccmim export timm` writes, 1.0.28 counts registers to the first layer, 1.0.30 has
    # norms of queries and keys in Eva, 1.0.31 mixed rotary positions in float64.
    "timm>=1.0.31",
    "numpy>=1.26",
    "pillow>=10.1",
    "pyarrow>=16",  # knows binary views
    "tifffile>=2024.1.30",
    "fsspec>=2024.2",
    "argcomplete>=3.1",  # the shell's completion of commands and settings: register-python-argcomplete ccmim
    "pyyaml>=6",
    "rich>=13",
    "tensorboard>=2.16.2",  # 2.16.0 and 2.16.1 install TensorFlow, nightly
    "matplotlib>=3.8",
    "jinja2>=3.1",
    "scipy>=1.11.1",
    "scikit-learn>=1.4",
    "scikit-image>=0.22",
    "safetensors>=0.4.3",
]

DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5"]  # `make docs`

EXTRAS = {
    # NVIDIA apex is no extra: the package index's `apex` is an unrelated web toolkit; build NVIDIA's from its source.
    # DALI 1.36 to 1.52 are no wheels on the package index, but fetch one from NVIDIA's.
    # xformers' wheel is built for CUDA 12, of which it needs the runtime beside that of CUDA 13.
    "cuda13": ["nvidia-dali-cuda130>=2.0", "xformers>=0.0.33", "nvidia-cuda-runtime-cu12>=12.6"],
    "cuda12": ["nvidia-dali-cuda120>=1.53", "xformers>=0.0.31"],
    # The last releases that carry code for compute capability 6.x (GTX 1080 Ti).
    "pascal": ["torch==2.7.1", "torchvision==0.22.1", "xformers==0.0.31.post1", "nvidia-dali-cuda120>=1.53"],
    # Images behind http(s):// URLs; s3:// wants s3fs, gs:// gcsfs, and so on.
    "remote": ["fsspec[http]>=2024.2"],
    # TIFFs compressed by LZW, ZSTD, LERC, JPEG and others, or of 12 bits; images of 3 channels and 8 bits need it not.
    "tiff": ["imagecodecs>=2024.6.1"],
    # `ccmim submit`; its --print needs nothing.
    "slurm": ["submitit>=1.5.4"],  # has a teardown
    # What `ccmim bench throughput` compares with, but for lightly and stable-pretraining: their lists allow releases of
    # lightning that were compromised. pip install --no-deps -r requirements/bench.txt
    "bench": ["transformers>=5.4"],
    # `ccmim export onnx`; the other targets need nothing.
    "export": ["onnx>=1.17", "onnxscript>=0.7"],  # which writes what torch 2.7 exports with today's protobuf
    # `ccmim eval segmentation`: UPerNet's decoder.
    "segmentation": ["segmentation_models_pytorch>=0.5"],
    # `ccmim eval detection`: average precision, and COCO's masks.
    "detection": ["torchmetrics>=1.9", "faster-coco-eval>=1.8"],
    "dev": [
        *("pytest>=8", "pytest-xdist>=3.6.1", "hypothesis>=6.100", "ruff>=0.11"),
        *("fsspec[http]>=2024.2", "submitit>=1.5.4"),
        # What exports are loaded by in the tests; AutoImageProcessor takes `backend` from transformers 5.4 on.
        *("transformers>=5.4", "onnx>=1.17", "onnxscript>=0.7", "onnxruntime>=1.18"),
        "segmentation_models_pytorch>=0.5",
        *("torchmetrics>=1.9", "faster-coco-eval>=1.8"),
        *DOCS,
    ],
}

setup(
    name="ccmim_fast",
    version="0.1.0",
    description="A fast trainer for masked image modelling with ccMIM (ICLR 2023)",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["ccmim_fast", "ccmim_fast.*"]),
        *find_packages("kernels", include=["ccmim_kernels", "ccmim_kernels.*"]),
        "ccmim_fast.configs",
    ],
    package_dir={"ccmim_kernels": "kernels/ccmim_kernels", "ccmim_fast.configs": "configs"},
    package_data={
        "ccmim_fast.configs": ["*.yaml", "eval/*.yaml"],
        "ccmim_fast.report": ["*.html"],
        "ccmim_fast.export": ["*.md"],
        "ccmim_fast.ranks": ["*.sh"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ccmim = ccmim_fast.cli:main"]},
)
