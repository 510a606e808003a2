#!/usr/bin/env bash
# timm 1.0.31: create_model drops arguments that are None, so a part of an architecture cannot be unset by them.
#
# `init_values=None` is how a VisionTransformer or an Eva is told to have no layer scale. Passed to `create_model` of a
# name that has one, it is taken out before the model is built, and the architecture's own value stands: no error, and
# a model with weights that one believes are not there. The class itself, called with None, has none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision timm==1.0.31 numpy
cat > "$folder/none.py" << 'PYTHON'
import timm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

print("timm", timm.__version__)
small = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3}
vit = timm.create_model("deit3_small_patch16_224", **small, init_values=None).blocks[0]
print("deit3 by create_model:", type(vit.ls1).__name__)
print("VisionTransformer:", type(VisionTransformer(**small, init_values=None).blocks[0].ls1).__name__)
eva = timm.create_model("vit_small_patch16_rope_224", **small, init_values=None).blocks[0]
print("rope by create_model:", "none" if eva.gamma_1 is None else "layer scale")
print("Eva:", "none" if Eva(**small, init_values=None).blocks[0].gamma_1 is None else "layer scale")
PYTHON
"$folder/venv/bin/python" "$folder/none.py" 2> /dev/null | tee "$folder/seen"
diff - "$folder/seen" << 'EXPECTED'
timm 1.0.31
deit3 by create_model: LayerScale
VisionTransformer: Identity
rope by create_model: layer scale
Eva: none
EXPECTED
