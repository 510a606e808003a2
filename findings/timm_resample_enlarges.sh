#!/usr/bin/env bash
# timm 1.0.31, torch 2.14.1: resample_abs_pos_embed has another bicubic kernel than MAE's plain resampling, also upwards.
#
# Antialiasing widens the kernel where a grid shrinks; where it grows, one expects `antialias=True` to change nothing.
# But torch's two paths have different cubics: Keys' a = -0.5 with antialiasing, a = -0.75 without. timm resamples
# position embeddings with antialiasing, the code of MAE, DINO and ViTDet without. So the same weights at a larger image
# have other positions in timm than in the code that they come from: one row of the impulse response shows it, and noise
# from 14 x 14 to 24 x 24 differs by a twelfth of its deviation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision timm==1.0.31 numpy
cat > "$folder/resample.py" << 'PYTHON'
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

print("timm", timm.__version__)
impulse = torch.zeros(1, 49, 1)
impulse[0, 24] = 1
image = impulse.view(1, 1, 7, 7)
ours = resample_abs_pos_embed(impulse, new_size=[14, 14], old_size=[7, 7], num_prefix_tokens=0).view(14, 14)
plain = F.interpolate(image, (14, 14), mode="bicubic")[0, 0]
for name, grid in (("timm ", ours), ("plain", plain)):
    row = grid[6] / grid[6].sum()
    print(name, " ".join(f"{value:+.4f}" for value in row[3:7].tolist()))
noise = torch.randn(1, 196, 64, generator=torch.Generator().manual_seed(0))
ours = resample_abs_pos_embed(noise, new_size=[24, 24], old_size=[14, 14], num_prefix_tokens=0)
plain = F.interpolate(noise.view(1, 14, 14, 64).permute(0, 3, 1, 2), (24, 24), mode="bicubic").flatten(2).mT
print(f"noise: rms difference {(ours - plain).square().mean().sqrt():.2f} of {plain.std():.2f}")
PYTHON
"$folder/venv/bin/python" "$folder/resample.py" 2> /dev/null | tee "$folder/seen"
diff - "$folder/seen" << 'EXPECTED'
timm 1.0.31
timm  -0.0117 -0.0352 +0.1133 +0.4336
plain -0.0176 -0.0527 +0.1309 +0.4395
noise: rms difference 0.07 of 0.87
EXPECTED
