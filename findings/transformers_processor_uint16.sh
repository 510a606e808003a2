#!/usr/bin/env bash
# transformers 5.23.0: the torchvision image processor wraps 16-bit arrays around when it resizes them, without a word.
#
# ViTImageProcessor takes NumPy arrays. uint16 in 0 .. 4095, as microscopes give, with rescale_factor 1/4095: one expects
# about 0 .. 1. As float32 they are so, but for what a bicubic curve overshoots. As uint16 what overshoots below zero
# wraps to 65535, which is 16 after rescaling. ViTImageProcessorPil refuses both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision transformers==5.23.0 pillow numpy
cat > "$folder/wrap.py" << 'PYTHON'
import numpy as np
from transformers import ViTImageProcessor, ViTImageProcessorPil, __version__

rng = np.random.default_rng(0)
image = rng.choice(np.array([0, 4095], dtype=np.uint16), size=(40, 60, 3))
options = {"size": {"height": 32, "width": 32}, "resample": 3, "do_normalize": False, "rescale_factor": 1 / 4095}
for made in (ViTImageProcessor, ViTImageProcessorPil):
    for kind in (np.float32, np.uint16):
        try:
            found = made(**options)(image.astype(kind), return_tensors="np", input_data_format="channels_last")
            pixels = np.asarray(found["pixel_values"])
            told = f"{pixels.min():.1f} .. {pixels.max():.1f}"
        except Exception as error:
            told = type(error).__name__
        print(__version__, made.__name__, kind.__name__, told)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/wrap.py" 2> "$folder/errors" | tee "$folder/seen"
diff - "$folder/seen" << 'EXPECTED'
5.23.0 ViTImageProcessor float32 -0.2 .. 1.1
5.23.0 ViTImageProcessor uint16 0.0 .. 16.0
5.23.0 ViTImageProcessorPil float32 ValueError
5.23.0 ViTImageProcessorPil uint16 ValueError
EXPECTED
