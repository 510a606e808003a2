#!/usr/bin/env bash
# transformers 5.23.0: ViTMAEForPreTraining.save_pretrained writes the decoder's blocks under names of its own.
#
# The published files of ViTMAE, and those that 4.57.6 writes, call them `decoder.decoder_layers.N`. The model of 5.23.0
# has these names in memory too, and reads the published files. What it writes is `decoder.decoder_encoder.layer.N`: the
# renaming for the encoder, `layers` to `encoder.layer`, meets the decoder's names as well. 5.23.0 reads that back.
# 4.57.6 does not: it warns that weights were newly initialised, and returns a model with a random decoder. Who reads
# such a file by its names, as converters do, has to know both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.23.0
"$folder/venv/bin/pip" install --quiet --target "$folder/old" transformers==4.57.6
cat > "$folder/write.py" << 'PYTHON'
import sys

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining, __version__

sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
model = ViTMAEForPreTraining(ViTMAEConfig(image_size=32, patch_size=8, **sizes, **decoder))
torch.nn.init.constant_(model.state_dict()["decoder.decoder_layers.0.layernorm_before.bias"], 7)
model.save_pretrained(sys.argv[1])
print(__version__, "in memory", sorted({name.split("0.")[0] for name in model.state_dict() if "decoder" in name and "0." in name}))
PYTHON
cat > "$folder/read.py" << 'PYTHON'
import sys

from safetensors import safe_open
from transformers import ViTMAEForPreTraining, __version__

with safe_open(f"{sys.argv[1]}/model.safetensors", "pt") as file:
    names = sorted({name.split("0.")[0] for name in file.keys() if name.startswith("decoder") and "0." in name})
found = ViTMAEForPreTraining.from_pretrained(sys.argv[1]).state_dict()
bias = found["decoder.decoder_layers.0.layernorm_before.bias"]
print(__version__, "reads a file with", names, "the decoder is", "as written" if (bias == 7).all() else "random")
PYTHON
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
python="$folder/venv/bin/python"
{
    "$python" "$folder/write.py" "$folder/five"
    "$python" "$folder/read.py" "$folder/five"
    PYTHONPATH="$folder/old" "$python" "$folder/write.py" "$folder/four"
    PYTHONPATH="$folder/old" "$python" "$folder/read.py" "$folder/five"
    "$python" "$folder/read.py" "$folder/four"
} 2> "$folder/errors" | tee "$folder/seen"
diff - "$folder/seen" << 'EXPECTED'
5.23.0 in memory ['decoder.decoder_layers.']
5.23.0 reads a file with ['decoder.decoder_encoder.layer.'] the decoder is as written
4.57.6 in memory ['decoder.decoder_layers.']
4.57.6 reads a file with ['decoder.decoder_encoder.layer.'] the decoder is random
5.23.0 reads a file with ['decoder.decoder_layers.'] the decoder is as written
EXPECTED
